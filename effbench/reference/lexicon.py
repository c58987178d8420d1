"""The closed vocabulary of the synthetic world: every word there is, in groups of one type.

Words of an open class (names, towns, keys) are invented, so that no word carries a meaning from elsewhere and all words
of a group look alike to a tokenizer: one word, one token.
"""

from __future__ import annotations

from random import Random

SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")


def _split(words: str) -> list[str]:
    return words.split()


_FORM = _split(
    ". , ? | = + - a the of in is was to are were has have who what where when list find copy story given color born "
    "he she comes came from grew up hometown birthplace works for joined employed by employer company studied majored "
    "degree subject around year birth life began dates did study employs went took dropped now then often that here"
)
_PREPOSITIONS = _split("near behind beside above under")
_ADJECTIVES = _split("old young tall small happy quiet brave tired")
_NOUNS = _split("dog cat farmer doctor pilot singer king queen nurse baker author lawyer artist driver soldier poet")
_VERBS = _split("see like follow know help meet")
_ROOMS = _split("kitchen garden attic cellar library garage bedroom hall office barn chapel tower")
_OBJECTS = _split("ball lamp book coin cup hat rope bell drum flag mask ring sword clock letter basket")
_COLORS = _split("red blue green black white gold gray pink brown purple")
_FIELDS = _split(
    "physics biology law music history chemistry finance medicine geology botany logic poetry painting farming "
    "cooking sailing mining optics ethics drama design grammar algebra genetics ecology robotics acting coaching "
    "carving weaving dancing printing zoology rhetoric surgery statistics theology tailoring pottery plumbing "
    "philosophy nursing metallurgy masonry linguistics journalism hydrology geometry"
)

_ONSETS = _split("b d f g k l m n p r s t v z")
_VOWELS = _split("a e i o u")


def _invented(random: Random, count: int, syllables: int, endings: tuple[str, ...], taken: set[str]) -> list[str]:
    """`count` new words of `syllables` open syllables and one of the endings, none of them in `taken`."""
    words: list[str] = []
    while len(words) < count:
        stem = "".join(random.choice(_ONSETS) + random.choice(_VOWELS) for _ in range(syllables))
        word = stem + random.choice(endings)
        if word not in taken:
            taken.add(word)
            words.append(word)
    return words


class Lexicon:
    """All words and their ids; each group of words is a list of ids."""

    def __init__(self, seed: int) -> None:
        random = Random(seed)
        self.words: list[str] = []
        self.ids: dict[str, int] = {}
        self._group(list(SPECIAL) + _FORM)
        taken = {*_FORM, *_PREPOSITIONS, *_ADJECTIVES, *_NOUNS, *_VERBS, *_ROOMS, *_OBJECTS, *_COLORS, *_FIELDS}
        self.he_names = self._group(_invented(random, 50, 2, ("n", "r", "k"), taken))
        self.she_names = self._group(_invented(random, 50, 2, ("", "l", "h"), taken))
        self.first_names = self.he_names + self.she_names
        self.last_names = self._group(_invented(random, 100, 2, ("s", "th", "m"), taken))
        self.towns = self._group(_invented(random, 64, 2, ("burg", "ton", "port"), taken))
        self.firms = self._group(_invented(random, 64, 2, ("corp", "tek", "soft"), taken))
        self.fields = self._group(_FIELDS)
        self.years = self._group([str(year) for year in range(1936, 2000)])
        self.digits = self._group([str(digit) for digit in range(10)])
        self.keys = self._group(_invented(random, 128, 1, ("rk", "lt", "nd", "sp"), taken))
        self.values = self._group(_invented(random, 128, 1, ("sh", "mp", "ft", "x"), taken))
        self.species = self._group(_invented(random, 32, 2, ("x", "q"), taken))
        self.singular = self._group(_NOUNS)
        self.plural = self._group([noun + "s" for noun in _NOUNS])
        self.verb_singular = self._group([verb + "s" for verb in _VERBS])
        self.verb_plural = self._group(_VERBS)
        self.prepositions = self._group(_PREPOSITIONS)
        self.adjectives = self._group(_ADJECTIVES)
        self.rooms = self._group(_ROOMS)
        self.objects = self._group(_OBJECTS)
        self.colors = self._group(_COLORS)
        self._phrases: dict[str, list[int]] = {}

    def _group(self, words: list[str]) -> list[int]:
        for word in words:
            if word in self.ids:
                raise ValueError(f"the word {word!r} is in the vocabulary twice")
            self.ids[word] = len(self.words)
            self.words.append(word)
        return [self.ids[word] for word in words]

    def phrase(self, text: str) -> list[int]:
        """The ids of words joined by single spaces."""
        if text not in self._phrases:
            self._phrases[text] = [self.ids[word] for word in text.split(" ")]
        return self._phrases[text]

    def text(self, ids: list[int]) -> str:
        """The words of the ids, joined by single spaces."""
        return " ".join(self.words[token] for token in ids)
