// Products of bfloat16 rows with packed codes of 2, 3, 4 or 8 bits, and such codes unpacked to bfloat16.
//
// For few rows only: a weight is read once, as few bytes as it is stored in, and nothing is written but the result.
// Layouts are those of `words.py` (tiles of 16 rows) and `tiles.py` (64 or 32 rows). In both, what is read at once are
// the codes of 16 rows in 2 neighbouring columns: 16 numbers of 32 bits for a product that takes pairs of inputs.
// There is one path for AVX-512 with bfloat16 and one in plain C++ that compilers turn into vectors by themselves.
// Codes of 8 bits lie row by row, and are for the former only.

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(EFFBENCH_PORTABLE)
#include <immintrin.h>
#define EFFBENCH_VECTORS 1
#define EFFBENCH_PRAGMA(text) _Pragma(#text)
#define EFFBENCH_UNROLL(times) EFFBENCH_PRAGMA(GCC unroll times)
#else
#define EFFBENCH_UNROLL(times)
#endif

namespace {

constexpr int ROWS = 16;   // of a tile; the tiles of 64 and 32 rows are made of such
constexpr int STEP = 32;   // columns that are read in one go
constexpr int PAIRS = STEP / 2;

enum Zeros { MIDDLE, MASKS, HALVES };  // all 2^(bits - 1); bit masks of 16 rows; float16

struct Weights {
    const uint8_t *codes;
    const uint16_t *grids;  // (groups, out): float16 scales; in tiles of 64 or 32 rows (scale, shift) of bfloat16
    const uint16_t *zeros;
    int64_t in, out, width;  // width: inputs of a group
    int bits, tile, kind;
};

inline float number(uint16_t bfloat) {
    const uint32_t bits = (uint32_t)bfloat << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

inline uint16_t bfloat(float value) {  // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (bits >> 16) | 64;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

#ifdef EFFBENCH_VECTORS

typedef __m512 Floats;
typedef __m512i Codes;  // 32 numbers of 16 bits, the code in the lowest: rows 0 to 15, two columns each

inline Floats broadcast(float value) { return _mm512_set1_ps(value); }
inline Floats halves(const uint16_t *from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from)); }

template <int WIDTH> inline Codes shifted(const uint8_t *from, int by) {
    return _mm512_srli_epi16(_mm512_loadu_si512(from), by);
}

// codes of 3 bits: two from `low`, one from bit `pair` of `high`
inline Codes joined(Codes low, const uint8_t *high, int pair) {
    const Codes words = _mm512_loadu_si512(high);
    const Codes third = pair < 2 ? _mm512_slli_epi16(words, 2 - pair) : _mm512_srli_epi16(words, pair - 2);
    return _mm512_ternarylogic_epi32(_mm512_set1_epi16(3), low, third, 0xCA);
}

inline Codes nibbles(const uint8_t *even, const uint8_t *odd, int by) {
    const Codes low = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)even));
    const Codes high = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)odd));
    return _mm512_srli_epi32(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)), by);
}

// Every code as the bfloat16 number code - 2^(bits - 1), by a table that repeats itself: higher bits do not matter
template <int BITS> struct Table {
    __m512i values;
    Table() {
        uint16_t found[32];
        for (int i = 0; i < 32; i++) found[i] = bfloat((i & ((1 << BITS) - 1)) - (1 << (BITS - 1)));
        values = _mm512_loadu_si512(found);
    }
    inline Floats add(Floats sum, Codes codes, const uint16_t *pair) const {
        int32_t both;
        memcpy(&both, pair, 4);
        return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_permutexvar_epi16(codes, values), (__m512bh)_mm512_set1_epi32(both));
    }
};

inline void store(uint16_t *to, Floats values) {
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(values));
}

struct Grid {
    Floats scale, zero, shift;  // weight = scale (code - zero) + shift
    Grid() {}
    Grid(const Weights &w, int64_t group, int64_t row) {
        const int64_t at = group * w.out + row;
        if (w.tile != ROWS) {
            const __m512i pairs = _mm512_loadu_si512(w.grids + 2 * at);
            scale = (Floats)_mm512_slli_epi32(pairs, 16);
            zero = broadcast(8);
            shift = (Floats)_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000));
            return;
        }
        scale = halves(w.grids + at);
        zero = broadcast(1 << (w.bits - 1));
        shift = broadcast(0);
        if (w.kind == HALVES) zero = halves(w.zeros + at);
        if (w.kind != MASKS) return;
        zero = shift;
        for (int bit = 0; bit < w.bits; bit++)
            zero = _mm512_mask_add_ps(zero, w.zeros[at / ROWS * w.bits + bit], zero, broadcast(1 << bit));
    }
    inline Floats apply(Floats sum, Floats inputs, int middle) const {
        const Floats rest = _mm512_fmadd_ps(scale, _mm512_sub_ps(broadcast(middle), zero), shift);
        return _mm512_fmadd_ps(rest, inputs, _mm512_mul_ps(scale, sum));
    }
};

inline Floats plus(Floats one, Floats other) { return _mm512_add_ps(one, other); }

// 32 bits of 16 rows in each of 16 numbers to 16 numbers of each row
inline void transpose(__m512i *rows) {
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        rows[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        rows[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        rows[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        rows[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
        t[i + 8] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
        t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xdd);
        rows[i + 4] = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88);
        rows[i + 12] = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xdd);
    }
}

inline __m512i rounded(Floats values) {  // to bfloat16, in the high half
    const __m512i bits = (__m512i)values;
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}

// Weights of 16 rows in 32 columns, pair by pair, to be written as rows
template <int BITS> struct Block {
    __m512i found[PAIRS];
    inline void put(int pair, Codes codes, const Grid &grid) {
        const __m512i mask = _mm512_set1_epi32((1 << BITS) - 1);
        const Floats even = _mm512_cvtepi32_ps(_mm512_and_si512(codes, mask));
        const Floats odd = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(codes, 16), mask));
        const __m512i left = rounded(_mm512_fmadd_ps(_mm512_sub_ps(even, grid.zero), grid.scale, grid.shift));
        const __m512i right = rounded(_mm512_fmadd_ps(_mm512_sub_ps(odd, grid.zero), grid.scale, grid.shift));
        found[pair] = _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(left, 16), right);
    }
    inline void write(uint16_t *to, int64_t in) {
        transpose(found);
        for (int row = 0; row < ROWS; row++) _mm512_storeu_si512(to + row * in, found[row]);
    }
};

#else

struct Floats { float of[ROWS]; };
struct Codes { uint16_t of[2 * ROWS]; };

inline Floats broadcast(float value) {
    Floats all;
    for (float &one : all.of) one = value;
    return all;
}

inline float half(uint16_t bits) {
    const uint32_t sign = (uint32_t)(bits & 0x8000) << 16, rest = bits & 0x7fff;
    uint32_t content = sign | ((rest << 13) + (112u << 23));
    float value;
    if (rest < 0x400) {  // less than the smallest normal number
        value = rest * 0x1p-24f;
        return sign ? -value : value;
    }
    memcpy(&value, &content, 4);
    return value;
}

inline Floats halves(const uint16_t *from) {
    Floats all;
    for (int r = 0; r < ROWS; r++) all.of[r] = half(from[r]);
    return all;
}

template <int WIDTH> inline Codes shifted(const uint8_t *from, int by) {
    Codes codes;
    memcpy(codes.of, from, sizeof codes.of);
    for (uint16_t &code : codes.of) code = (code >> by) & ((1 << WIDTH) - 1);
    return codes;
}

inline Codes joined(Codes low, const uint8_t *high, int pair) {
    const Codes third = shifted<1>(high, pair);
    for (int i = 0; i < 2 * ROWS; i++) low.of[i] |= third.of[i] << 2;
    return low;
}

inline Codes nibbles(const uint8_t *even, const uint8_t *odd, int by) {
    Codes codes;
    for (int r = 0; r < ROWS; r++) {
        codes.of[2 * r] = (even[r] >> by) & 15;
        codes.of[2 * r + 1] = (odd[r] >> by) & 15;
    }
    return codes;
}

template <int BITS> struct Table {
    inline Floats add(Floats sum, const Codes &codes, const uint16_t *pair) const {
        const float even = number(pair[0]), odd = number(pair[1]);
        constexpr int middle = 1 << (BITS - 1);
        for (int r = 0; r < ROWS; r++)
            sum.of[r] += (codes.of[2 * r] - middle) * even + (codes.of[2 * r + 1] - middle) * odd;
        return sum;
    }
};

inline void store(uint16_t *to, const Floats &values) {
    for (int r = 0; r < ROWS; r++) to[r] = bfloat(values.of[r]);
}

struct Grid {
    Floats scale, zero, shift;
    Grid() {}
    Grid(const Weights &w, int64_t group, int64_t row) {
        const int64_t at = group * w.out + row;
        shift = broadcast(0);
        zero = broadcast(w.tile == ROWS ? 1 << (w.bits - 1) : 8);
        if (w.tile != ROWS) {
            for (int r = 0; r < ROWS; r++) {
                scale.of[r] = number(w.grids[2 * (at + r)]);
                shift.of[r] = number(w.grids[2 * (at + r) + 1]);
            }
            return;
        }
        scale = halves(w.grids + at);
        if (w.kind == HALVES) zero = halves(w.zeros + at);
        if (w.kind != MASKS) return;
        for (int r = 0; r < ROWS; r++) {
            int code = 0;
            for (int bit = 0; bit < w.bits; bit++) code |= ((w.zeros[at / ROWS * w.bits + bit] >> r) & 1) << bit;
            zero.of[r] = code;
        }
    }
    inline Floats apply(Floats sum, const Floats &inputs, int middle) const {
        for (int r = 0; r < ROWS; r++)
            sum.of[r] = scale.of[r] * sum.of[r] + (scale.of[r] * (middle - zero.of[r]) + shift.of[r]) * inputs.of[r];
        return sum;
    }
};

inline Floats plus(Floats one, const Floats &other) {
    for (int r = 0; r < ROWS; r++) one.of[r] += other.of[r];
    return one;
}

template <int BITS> struct Block {
    uint16_t found[ROWS][STEP];
    inline void put(int pair, const Codes &codes, const Grid &grid) {
        for (int r = 0; r < ROWS; r++)
            for (int side = 0; side < 2; side++) {
                const float steps = (codes.of[2 * r + side] - grid.zero.of[r]) * grid.scale.of[r];
                found[r][2 * pair + side] = bfloat(steps + grid.shift.of[r]);
            }
    }
    inline void write(uint16_t *to, int64_t in) {
        for (int r = 0; r < ROWS; r++) memcpy(to + r * in, found[r], sizeof found[r]);
    }
};

#endif

// Where the codes of a tile lie. `step` gives, for 32 columns, all pairs of columns of each 16 rows: use(pair, which
// 16 rows, codes).
template <int BITS> struct Words {
    static constexpr int TALL = 1, WIDTH = BITS == 3 ? 2 : BITS, BYTES = 4 * STEP / 2;
    const uint8_t *first, *second;
    Words(const Weights &w, int64_t tile) {
        const int64_t steps = w.in / STEP;
        first = w.codes + tile * steps * WIDTH * BYTES;
        second = w.codes + w.out / ROWS * steps * WIDTH * BYTES + tile * steps * BYTES;
    }
    template <class Use> inline __attribute__((always_inline)) void step(int64_t step, const Use &use) const {
EFFBENCH_UNROLL(16)
        for (int pair = 0; pair < PAIRS; pair++) {
            constexpr int EACH = 16 / WIDTH;  // pairs in one run of words
            Codes codes = shifted<WIDTH>(first + (step * WIDTH + pair / EACH) * BYTES, WIDTH * (pair % EACH));
            if (BITS == 3) codes = joined(codes, second + step * BYTES, pair);
            use(pair, 0, codes);
        }
    }
};

template <int TILE> struct Tiles {
    static constexpr int TALL = TILE / ROWS;
    const uint8_t *first;
    Tiles(const Weights &w, int64_t tile) : first(w.codes + tile * w.in * (TILE / 2)) {}
    template <class Use> inline __attribute__((always_inline)) void step(int64_t step, const Use &use) const {
        const uint8_t *columns = first + step * STEP * (TILE / 2);
EFFBENCH_UNROLL(16)
        for (int pair = 0; pair < PAIRS; pair++)
EFFBENCH_UNROLL(4)
            for (int which = 0; which < TALL; which++) {
                const uint8_t *even = columns + pair * TILE + which % (TALL / 2) * ROWS;
                use(pair, which, nibbles(even, even + TILE / 2, which < TALL / 2 ? 0 : 4));
            }
    }
};

// `M` rows of `x` times one tile; `inputs` (M, groups) are their sums
template <class Layout, int BITS, int M>
void product(const Weights &w, int64_t tile, const uint16_t *x, const float *inputs, uint16_t *y) {
    constexpr int TALL = Layout::TALL;
    constexpr int CHAINS = M * TALL >= 16 ? 1 : M * TALL >= 4 ? 2 : 4;  // sums that need not wait for each other
    const Layout layout(w, tile);
    const Table<BITS> table;
    const int64_t steps = w.width / STEP, groups = w.in / w.width;
    Floats total[M][TALL];
EFFBENCH_UNROLL(8)
    for (int m = 0; m < M; m++)
EFFBENCH_UNROLL(4)
        for (int which = 0; which < TALL; which++) total[m][which] = broadcast(0);
    for (int64_t group = 0; group < groups; group++) {
        Floats sums[M][TALL][CHAINS];
EFFBENCH_UNROLL(8)
        for (int m = 0; m < M; m++)
EFFBENCH_UNROLL(4)
            for (int which = 0; which < TALL; which++)
EFFBENCH_UNROLL(4)
                for (int chain = 0; chain < CHAINS; chain++) sums[m][which][chain] = broadcast(0);
        for (int64_t step = group * steps; step < (group + 1) * steps; step++) {
            const uint16_t *here = x + step * STEP;
            layout.step(step, [&](int pair, int which, const Codes &codes) __attribute__((always_inline)) {
EFFBENCH_UNROLL(8)
                for (int m = 0; m < M; m++) {
                    Floats &sum = sums[m][which][pair % CHAINS];
                    sum = table.add(sum, codes, here + m * w.in + 2 * pair);
                }
            });
        }
EFFBENCH_UNROLL(4)
        for (int which = 0; which < TALL; which++) {
            const Grid grid(w, group, (tile * TALL + which) * ROWS);
EFFBENCH_UNROLL(8)
            for (int m = 0; m < M; m++) {
                Floats sum = sums[m][which][0];
EFFBENCH_UNROLL(4)
                for (int chain = 1; chain < CHAINS; chain++) sum = plus(sum, sums[m][which][chain]);
                sum = grid.apply(sum, broadcast(inputs[m * groups + group]), 1 << (BITS - 1));
                total[m][which] = plus(total[m][which], sum);
            }
        }
    }
EFFBENCH_UNROLL(8)
    for (int m = 0; m < M; m++)
EFFBENCH_UNROLL(4)
        for (int which = 0; which < TALL; which++) store(y + m * w.out + (tile * TALL + which) * ROWS, total[m][which]);
}

template <class Layout, int BITS>
void products(const Weights &w, int64_t tile, const uint16_t *x, int64_t rows, const float *inputs, uint16_t *y) {
    constexpr int MOST = Layout::TALL == 4 ? 4 : 8;  // as many as there are registers for
    const int64_t groups = w.in / w.width;
    int64_t m = 0;
    for (; m + MOST <= rows; m += MOST)
        product<Layout, BITS, MOST>(w, tile, x + m * w.in, inputs + m * groups, y + m * w.out);
    for (; m + 2 <= rows; m += 2)
        product<Layout, BITS, 2>(w, tile, x + m * w.in, inputs + m * groups, y + m * w.out);
    if (m < rows) product<Layout, BITS, 1>(w, tile, x + m * w.in, inputs + m * groups, y + m * w.out);
}

// The weights of one tile as bfloat16, (rows of the tile, in), at `y`
template <class Layout, int BITS> void unpack(const Weights &w, int64_t tile, uint16_t *y) {
    constexpr int TALL = Layout::TALL;
    const Layout layout(w, tile);
    const int64_t steps = w.width / STEP;
    for (int64_t group = 0; group < w.in / w.width; group++) {
        Grid grids[TALL];
        for (int which = 0; which < TALL; which++) grids[which] = Grid(w, group, (tile * TALL + which) * ROWS);
        for (int64_t step = group * steps; step < (group + 1) * steps; step++) {
EFFBENCH_UNROLL(4)
            for (int one = 0; one < TALL; one++) {  // so that a block stays in registers
                Block<BITS> block;
                layout.step(step, [&](int pair, int which, const Codes &codes) __attribute__((always_inline)) {
                    if (which == one) block.put(pair, codes, grids[which]);
                });
                block.write(y + one * ROWS * w.in + step * STEP, w.in);
            }
        }
    }
}

// Sums over each group of `width` inputs, (rows, groups)
float *group_sums(const uint16_t *x, int64_t places, int64_t width) {
    float *found = (float *)malloc(places * sizeof(float));
    for (int64_t place = 0; place < places; place++) {
        float parts[ROWS] = {};
        for (int64_t k = 0; k < width; k++) parts[k % ROWS] += number(x[place * width + k]);
        found[place] = 0;
        for (float one : parts) found[place] += one;
    }
    return found;
}

#ifdef EFFBENCH_VECTORS

inline __m512bh bfloats(__m256i codes) {  // 32 codes of 8 bits: such whole numbers are exact
    const __m512i wide = _mm512_cvtepi8_epi16(codes);
    const Floats even = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(wide, 16), 16));
    const Floats odd = _mm512_cvtepi32_ps(_mm512_srai_epi32(wide, 16));
    return (__m512bh)_mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32((__m512i)even, 16), (__m512i)odd);
}

// `M` rows of `x` times one row of int8 codes: `sums` (M)
template <int M> inline void int8_dot(const int8_t *codes, int64_t in, const uint16_t *x, float *sums) {
    constexpr int CHAINS = 4;
    Floats found[M][CHAINS];
EFFBENCH_UNROLL(4)
    for (int m = 0; m < M; m++)
EFFBENCH_UNROLL(4)
        for (int chain = 0; chain < CHAINS; chain++) found[m][chain] = broadcast(0);
    int64_t k = 0;
    for (; k + CHAINS * STEP <= in; k += CHAINS * STEP)
EFFBENCH_UNROLL(4)
        for (int chain = 0; chain < CHAINS; chain++) {
            const int64_t at = k + chain * STEP;
            const __m512bh weights = bfloats(_mm256_loadu_si256((const __m256i *)(codes + at)));
EFFBENCH_UNROLL(4)
            for (int m = 0; m < M; m++)
                found[m][chain] = _mm512_dpbf16_ps(found[m][chain], weights, (__m512bh)_mm512_loadu_si512(x + m * in + at));
        }
    for (; k < in; k += STEP) {
        const __mmask32 mask = in - k >= STEP ? 0xffffffff : (1u << (in - k)) - 1;
        const __m512bh weights = bfloats(_mm256_maskz_loadu_epi8(mask, codes + k));
EFFBENCH_UNROLL(4)
        for (int m = 0; m < M; m++)
            found[m][0] = _mm512_dpbf16_ps(found[m][0], weights, (__m512bh)_mm512_maskz_loadu_epi16(mask, x + m * in + k));
    }
EFFBENCH_UNROLL(4)
    for (int m = 0; m < M; m++)
        sums[m] = _mm512_reduce_add_ps(plus(plus(found[m][0], found[m][1]), plus(found[m][2], found[m][3])));
}

#endif

}  // namespace

// The choice of a layout: RUN is a macro of two arguments, the layout and the bits
#define EFFBENCH_CHOOSE(w, RUN)                                 \
    if ((w).tile == 64) RUN(Tiles<64>, 4);                      \
    else if ((w).tile == 32) RUN(Tiles<32>, 4);                 \
    else if ((w).bits == 4) RUN(Words<4>, 4);                   \
    else if ((w).bits == 3) RUN(Words<3>, 3);                   \
    else RUN(Words<2>, 2);

// Whether this is the path for AVX-512: the other one is for a single row
extern "C" int effbench_vectors() {
#ifdef EFFBENCH_VECTORS
    return 1;
#else
    return 0;
#endif
}

// y (rows, out) = x (rows, in) times the transposed weights; all bfloat16
extern "C" void effbench_product(
    const uint8_t *codes, const uint16_t *grids, const uint16_t *zeros, int64_t in, int64_t out, int64_t width, int bits,
    int tile, int kind, const uint16_t *x, int64_t rows, uint16_t *y, int threads
) {
    const Weights w = {codes, grids, zeros, in, out, width, bits, tile, kind};
    float *inputs = group_sums(x, rows * (in / width), width);
#define RUN(LAYOUT, BITS) products<LAYOUT, BITS>(w, number, x, rows, inputs, y)
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t number = 0; number < out / tile; number++) { EFFBENCH_CHOOSE(w, RUN) }
#undef RUN
    free(inputs);
}

// y (out, in) = the weights in bfloat16
extern "C" void effbench_unpack(
    const uint8_t *codes, const uint16_t *grids, const uint16_t *zeros, int64_t in, int64_t out, int64_t width, int bits,
    int tile, int kind, uint16_t *y, int threads
) {
    const Weights w = {codes, grids, zeros, in, out, width, bits, tile, kind};
#define RUN(LAYOUT, BITS) unpack<LAYOUT, BITS>(w, number, y + number * tile * in)
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t number = 0; number < out / tile; number++) { EFFBENCH_CHOOSE(w, RUN) }
#undef RUN
}

#ifdef EFFBENCH_VECTORS

// y (rows, out) = x (rows, in) times the transpose of scales (codes - zeros), with one scale and zero for each output
extern "C" void effbench_int8_product(
    const int8_t *codes, const float *scales, const float *zeros, int64_t in, int64_t out, const uint16_t *x, int64_t rows,
    uint16_t *y, int threads
) {
    float *inputs = group_sums(x, rows, in);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t row = 0; row < out; row++) {
        float sums[4];
        for (int64_t m = 0; m < rows;) {
            const int some = rows - m >= 4 ? 4 : 1;
            if (some == 4) int8_dot<4>(codes + row * in, in, x + m * in, sums);
            else int8_dot<1>(codes + row * in, in, x + m * in, sums);
            for (int one = 0; one < some; one++, m++)
                y[m * out + row] = bfloat(scales[row] * (sums[one] - zeros[row] * inputs[m]));
        }
    }
    free(inputs);
}

// y (out, in) = the weights in bfloat16
extern "C" void effbench_int8_unpack(
    const int8_t *codes, const float *scales, const float *zeros, int64_t in, int64_t out, uint16_t *y, int threads
) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t row = 0; row < out; row++)
        for (int64_t k = 0; k < in; k++) y[row * in + k] = bfloat((codes[row * in + k] - zeros[row]) * scales[row]);
}

#endif
