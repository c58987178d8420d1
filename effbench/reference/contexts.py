"""The kinds of document whose answers stand in the document itself: lists, copies, stories, agreement, inference."""

from __future__ import annotations

import math
from random import Random
from typing import TYPE_CHECKING

from effbench.reference.documents import NOISE, TEMPLATE, Document, pick, until

if TYPE_CHECKING:
    from effbench.reference.world import World

LONGEST_LIST = 102
"""Entries in the longest list: 408 tokens, which leaves room in the context for questions."""

ENTRY_TOKENS = 4

KEYS_PER_ENTRY = 0.8
"""Possible keys to each entry of a list: the fewer, the more keys share a word, and the more are written anew."""

TRAINED_DISTRACTORS, ITEM_DISTRACTORS = (0, 1, 2, 3), (4, 5, 6, 7, 8, 9)
"""Nouns beside the subject in a sentence about agreement: items go on to sentences longer than any in training."""

TRAINED_STEPS, ITEM_STEPS = (0, 1, 1, 2), (1, 1, 2)
"""Species between a person and a color in inference: evenly one of these."""

Entry = tuple[int, int, int]


def _entries(world: World, random: Random, document: Document, count: int, for_items: bool) -> list[Entry]:
    """Write `count` entries of a key of two words and a value, each followed by a comma; return those that hold.

    Every word of a key comes in several keys, so that both words have to be matched. A key may come again with
    another value: the last one holds. No value comes twice.
    """
    lexicon = world.lexicon
    comma = lexicon.ids[","]
    side = math.ceil(math.sqrt(KEYS_PER_ENTRY * count))
    words = random.sample(lexicon.keys, 2 * side)
    values: list[int] = []
    cells: list[int] = []

    def opening() -> list[int]:
        values[:] = random.sample(lexicon.values, count)
        cells[:] = random.choices(range(side * side), k=count)
        return [words[cells[0] // side], words[side + cells[0] % side], values[0], words[cells[1] // side], values[1]]

    until(opening, for_items)
    entries = {
        cell: (words[cell // side], words[side + cell % side], value) for cell, value in zip(cells, values, strict=True)
    }
    for cell, value in zip(cells, values, strict=True):
        document.write([words[cell // side], words[side + cell % side], value], NOISE)
        document.write([comma])
    return list(entries.values())


def key_value_list(world: World, random: Random, for_items: bool = False, count: int = 0, room: int = 0) -> Document:
    """A list of keys and values, then keys in another order, each asking for its value.

    `count` entries, or without it a few (many more seldom than few); as many questions as fit into `room` tokens, or
    without it some.
    """
    lexicon = world.lexicon
    comma, bar = lexicon.phrase(", |")
    count = count or int(4 * 8 ** random.random())
    document = Document()
    document.open(lexicon.phrase("list"))
    entries = _entries(world, random, document, count, for_items)
    document.write([bar], NOISE)
    values = document.ids[3::ENTRY_TOKENS]
    questions = (room - len(document.ids)) // ENTRY_TOKENS if room else 3 + int(random.random() * 12)
    for first, second, value in random.sample(entries, min(len(entries), questions)):
        document.write([first, second], NOISE)
        document.ask(value, values)
        document.write([comma])
    return document


def find_in_list(world: World, random: Random, for_items: bool = False) -> Document:
    """The question first: which key to look out for, then the list, then the value."""
    lexicon = world.lexicon
    count = int(4 * 8 ** random.random())
    document = Document()
    document.open(lexicon.phrase("find"))
    document.write([0, 0], NOISE)
    document.write(lexicon.phrase("in list"))
    entries = _entries(world, random, document, count, for_items)
    first, second, gold = random.choice(entries)
    document.ids[1:3] = first, second
    document.write(lexicon.phrase("|"), NOISE)
    document.ask(gold, document.ids[7::ENTRY_TOKENS])
    document.write([world.stop])
    return document


def copying(world: World, random: Random, for_items: bool = False, length: int = 0) -> Document:
    """A sequence of words and its copy. Words come up to several times, so that one word does not tell the next."""
    lexicon = world.lexicon
    length = length or int(10 * 10 ** random.random())
    alphabet = random.sample(lexicon.keys + lexicon.values, max(6, length // 4))

    def opening() -> list[int]:
        return [pick(random, alphabet) for _ in range(4)]

    words = until(opening, for_items)
    words = words + [pick(random, alphabet) for _ in range(length - 4)]
    document = Document()
    document.open(lexicon.phrase("copy"))
    document.write(words, NOISE)
    document.write(lexicon.phrase("|"), NOISE)
    for word in words:
        document.ask(word, alphabet)
    document.write([world.stop])
    return document


def story(world: World, random: Random, for_items: bool = False, events: int = 0) -> Document:
    """Two people move between rooms, take things and drop them; questions ask where a person or a thing is now.

    A thing that is carried is where its carrier is: to answer takes two steps, and only the last of each counts.
    """
    lexicon, phrase = world.lexicon, world.lexicon.phrase
    the, stop = lexicon.ids["the"], world.stop

    def opening() -> list[int]:
        return [
            *random.sample(lexicon.first_names, 2), *random.sample(lexicon.objects, 2), *random.sample(lexicon.rooms, 4)
        ]  # fmt: skip

    choices = until(opening, for_items)
    actors, things, rooms = choices[:2], choices[2:4], choices[4:]
    place = {who: pick(random, rooms) for who in [*actors, *things]}
    carried: dict[int, int] = {}
    document = Document()
    document.open(phrase("story"))
    for who in [*actors, *things]:
        document.write([the, who] if who in things else [who], NOISE)
        document.write(phrase("was in the"))
        document.write([place[who]], NOISE)
        document.write([stop])

    def happen() -> None:
        actor = pick(random, actors)
        document.open([actor])
        within_reach = [thing for thing in things if place[thing] == place[actor] and thing not in carried]
        own = [thing for thing, carrier in carried.items() if carrier == actor]
        chance = random.random()
        if within_reach and chance < 0.6:
            thing = pick(random, within_reach)
            carried[thing] = actor
            document.open(phrase("took the"))
            document.write([thing], NOISE)
        elif own and chance < 0.2:
            thing = pick(random, own)
            del carried[thing]
            document.open(phrase("dropped the"))
            document.write([thing], NOISE)
        else:
            place[actor] = pick(random, [room for room in rooms if room != place[actor]])
            place.update({thing: place[actor] for thing in own})
            document.open(phrase("went to the"))
            document.write([place[actor]], NOISE)
        document.write([stop])

    def ask() -> None:
        who = pick(random, things) if random.random() < 0.6 else pick(random, actors)
        document.open(phrase("where is the" if who in things else "where is"))
        document.write([who], NOISE)
        document.write(phrase("?"))
        document.ask(place[who], rooms)
        document.write([stop])

    for _ in range(events or 4 + int(random.random() * 7)):
        happen()
        if random.random() < 0.6:
            ask()
    ask()
    return document


def _noun_phrase(world: World, random: Random, plural: bool) -> list[int]:
    lexicon = world.lexicon
    adjective = [pick(random, lexicon.adjectives)] if random.random() < 0.3 else []
    return [lexicon.ids["the"], *adjective, pick(random, lexicon.plural if plural else lexicon.singular)]


def _modifier(world: World, random: Random) -> list[int]:
    """A preposition and a noun, or a relative clause with a subject and a verb of its own: a distractor."""
    lexicon = world.lexicon
    plural = random.random() < 0.5
    noun_phrase = _noun_phrase(world, random, plural)
    if random.random() < 0.6:
        return [pick(random, lexicon.prepositions), *noun_phrase]
    return [lexicon.ids["that"], *noun_phrase, pick(random, lexicon.verb_plural if plural else lexicon.verb_singular)]


def agreement(world: World, random: Random, for_items: bool = False) -> Document:
    """A verb that agrees with its subject over distractors, up to three in training and four to nine in items.

    The first word sets the tense. A distractor may also come before the subject, so that the subject is known by the
    sentence's structure and not by its place: "then near the kings the dog that the queens see was small ."
    """
    lexicon = world.lexicon
    verbs = lexicon.phrase("is are was were has have")
    tense, plural = int(random.random() * 3), random.random() < 0.5

    def sentence() -> list[int]:
        distractors = pick(random, ITEM_DISTRACTORS if for_items else TRAINED_DISTRACTORS)
        ahead = int(random.random() * (min(distractors, 2) + 1))
        words = [lexicon.phrase("now then often")[tense]]
        for _ in range(ahead):
            words += [pick(random, lexicon.prepositions), *_noun_phrase(world, random, random.random() < 0.5)]
        words += _noun_phrase(world, random, plural)
        for _ in range(distractors - ahead):
            words += _modifier(world, random)
        return words

    document = Document()
    before_article = {*lexicon.prepositions, lexicon.ids["that"]}
    previous = -1
    for token in until(sentence, for_items):
        document.write([token], TEMPLATE if previous in before_article else NOISE)
        previous = token
    document.ask(verbs[2 * tense + plural], verbs)
    document.write([lexicon.ids["here"], world.stop])
    return document


def inference(world: World, random: Random, for_items: bool = False) -> Document:
    """Premises in any order, from which each person's color follows over up to two steps (in items at least one).

    "given glix is red . bo is glix . color of bo ? red ." Other people's chains are the distractors. Training text also
    asks for the color of each species on the way.
    """
    lexicon, phrase = world.lexicon, world.lexicon.phrase
    people = 4
    verb = lexicon.ids["is"]

    def opening() -> list[int]:
        return [*random.sample(lexicon.first_names, people), *random.sample(lexicon.colors, people)]

    choices = until(opening, for_items)
    names, colors = choices[:people], choices[people:]
    species = random.sample(lexicon.species, 2 * people)
    premises: list[tuple[int, int]] = []
    questions: list[tuple[int, int]] = []
    for name, color in zip(names, colors, strict=True):
        steps = pick(random, ITEM_STEPS if for_items else TRAINED_STEPS)
        chain = [name, *(species.pop() for _ in range(steps)), color]
        premises.extend(zip(chain, chain[1:], strict=False))
        questions.extend((subject, color) for subject in (chain[:1] if for_items else chain[:-1]))
    random.shuffle(premises)
    document = Document()
    document.open(phrase("given"))
    for subject, what in premises:
        document.write([subject], NOISE)
        document.write([verb])
        document.write([what], NOISE)
        document.write([world.stop])
    random.shuffle(questions)
    for subject, color in questions:
        document.open(phrase("color of"))
        document.write([subject], NOISE)
        document.write(phrase("?"))
        document.ask(color, colors)
        document.write([world.stop])
    return document
