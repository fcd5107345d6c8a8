// The Encoding kernel for one instruction set. build.py compiles this file once for each of them, with
// ENCNET_INSTRUCTIONS naming it; cpu_dispatch.cpp chooses among them at run time.
//
// Positions are taken in tiles. A tile of x is copied once, as float32, into scratch that stays in the L2 cache; norms,
// distances, weights, sums and gradients are all made from that copy, so that x crosses memory once in either pass.
// Every sum of products below is `product`, whose vector lanes run along codewords, positions or channels.
//
// An image's positions are cut into slices whose number depends on the sizes alone. Each group of slices has its own
// partial sums and these are added in order: results are the same bits for any number of threads.
//
// No function template of the standard library is called here: compiled with wide instructions, the linker could
// choose its copy for a processor that lacks them.

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cpu_kernels.h"

namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
constexpr int ROWS = 8;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
constexpr int ROWS = 6;
#else
constexpr int WIDTH = 4;
constexpr int ROWS = 6;
#endif

constexpr int64_t TILE = 64;                    // positions in a tile, a multiple of every WIDTH
constexpr int64_t AHEAD = 12;                   // channels that are fetched ahead of the one being copied
constexpr int64_t SLICE = 8 * TILE;             // a slice has at least so many positions
constexpr int64_t PARTIAL_BYTES = 1 << 20;      // all partial sums together, as long as FEWEST_GROUPS allows
constexpr int64_t MOST_GROUPS = 16, FEWEST_GROUPS = 4;

// ---------------------------------------------------------------------------------------------------- vectors

typedef float Lanes __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Bits __attribute__((vector_size(4 * WIDTH)));
typedef float LanesInMemory __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

inline Lanes load(const float *from) { return *reinterpret_cast<const LanesInMemory *>(from); }
inline void store(float *to, Lanes value) { *reinterpret_cast<LanesInMemory *>(to) = value; }
inline Lanes all(float value) { return value - Lanes{}; }

template <int DISTANCE>
inline Lanes swapped(Lanes v) {
    Bits order;
    for (int i = 0; i < WIDTH; ++i) order[i] = i ^ DISTANCE;
    return __builtin_shuffle(v, order);
}

template <int DISTANCE = WIDTH / 2>
inline float sum(Lanes v) {
    v += swapped<DISTANCE>(v);
    if constexpr (DISTANCE > 1)
        return sum<DISTANCE / 2>(v);
    else
        return v[0];
}

inline Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }

template <int DISTANCE = WIDTH / 2>
inline float largest(Lanes v) {
    v = larger(v, swapped<DISTANCE>(v));
    if constexpr (DISTANCE > 1)
        return largest<DISTANCE / 2>(v);
    else
        return v[0];
}

// e^v for v <= 0 to about one unit in the last place, 0 where it leaves float32's normal range; NaN stays NaN. Reduction
// by ln 2 in two parts and the polynomial are those of Moshier's Cephes library.
inline Lanes exponential(Lanes v) {
    const Lanes shifted = v * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer stands in the low bits
    const Lanes whole = shifted - 12582912.0f;
    const Lanes rest = v - whole * 0.693359375f + whole * 2.12194440e-4f;
    Lanes series = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    series = series * rest + 8.3334519073e-3f;
    series = series * rest + 4.1665795894e-2f;
    series = series * rest + 1.6666665459e-1f;
    series = series * rest + 5.0000001201e-1f;
    series = series * rest * rest + rest + 1.0f;
    const Bits power = ((Bits)shifted << 23) + 0x3f800000;
    return v < -87.0f ? Lanes{} : series * (Lanes)power;
}

// --------------------------------------------------------------------------------------------------- products

// A matrix that is read element by element: strides of its row and of the index that is summed over.
struct Left {
    const float *data;
    int64_t row_stride, depth_stride;
};

template <int R, int V>
inline void block(int64_t depth, Left left, const float *right, int64_t right_stride, float *out, int64_t out_stride,
                  bool accumulate) {
    Lanes sums[R][V];
    const float *rows[R];
    for (int r = 0; r < R; ++r) {
        rows[r] = left.data + r * left.row_stride;
        for (int v = 0; v < V; ++v) sums[r][v] = accumulate ? load(out + r * out_stride + v * WIDTH) : Lanes{};
    }
    for (int64_t j = 0, at = 0; j < depth; ++j, at += left.depth_stride, right += right_stride) {
        Lanes columns[V];
        for (int v = 0; v < V; ++v) columns[v] = load(right + v * WIDTH);
        for (int r = 0; r < R; ++r) {
            const Lanes value = all(rows[r][at]);
            for (int v = 0; v < V; ++v) sums[r][v] += value * columns[v];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(out + r * out_stride + v * WIDTH, sums[r][v]);
}

template <int V>
inline void rows_of(int64_t rows, int64_t depth, Left left, const float *right, int64_t right_stride, float *out,
                    int64_t out_stride, bool accumulate) {
    const auto take = [&](auto kernel, int count) {
        for (; rows >= count; rows -= count) {
            kernel(depth, left, right, right_stride, out, out_stride, accumulate);
            left.data += count * left.row_stride;
            out += count * out_stride;
        }
    };
    take(block<ROWS, V>, ROWS);
    take(block<4, V>, 4);
    take(block<2, V>, 2);
    take(block<1, V>, 1);
}

// out[r][l] (+)= sum_j left[r][j] right[j][l]; `lanes` is a multiple of WIDTH.
void product(int64_t rows, int64_t lanes, int64_t depth, Left left, const float *right, int64_t right_stride, float *out,
             int64_t out_stride, bool accumulate) {
    int64_t lane = 0;
    for (; lane + 2 * WIDTH <= lanes; lane += 2 * WIDTH)
        rows_of<2>(rows, depth, left, right + lane, right_stride, out + lane, out_stride, accumulate);
    if (lane < lanes) rows_of<1>(rows, depth, left, right + lane, right_stride, out + lane, out_stride, accumulate);
}

// ------------------------------------------------------------------------------------------------- conversions

inline float bits_to_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

// float16 has 5 exponent bits and 10 of fraction: moved to float32's place they stand for the value times 2^-112.
inline float from_half(uint16_t half) {
    const float magnitude = bits_to_float(uint32_t(half & 0x7fff) << 13) * 0x1p112f;
    const uint32_t infinite = (half & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;  // and NaN
    return bits_to_float(float_to_bits(magnitude) | infinite | uint32_t(half & 0x8000) << 16);
}

// Round to nearest, ties to even; above 65504 + 16 to infinity.
inline uint16_t to_half(float value) {
    const uint32_t bits = float_to_bits(value);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    const uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);
    if (magnitude < 0x38800000) {  // below 2^-14: a multiple of 2^-24, which adding 0.5 leaves in the low bits
        return uint16_t(sign | (float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000));
    }
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return uint16_t(sign | (rounded - 0x38000000) >> 13);
}

inline float from_bfloat(uint16_t value) { return bits_to_float(uint32_t(value) << 16); }

inline uint16_t to_bfloat(float value) {
    const uint32_t bits = float_to_bits(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Runs of x: `count` values that follow one another in memory, `offset` from its start.
void read_run(const encnet_features &x, int64_t offset, int64_t count, float *to) {
    const uint16_t *from = static_cast<const uint16_t *>(x.data) + offset;
    if (x.dtype == ENCNET_FLOAT32)
        memcpy(to, static_cast<const float *>(x.data) + offset, size_t(count) * 4);
    else if (x.dtype == ENCNET_FLOAT16)
        for (int64_t i = 0; i < count; ++i) to[i] = from_half(from[i]);
    else
        for (int64_t i = 0; i < count; ++i) to[i] = from_bfloat(from[i]);
}

void write_run(const encnet_features &x, int64_t offset, int64_t count, const float *from) {
    uint16_t *to = static_cast<uint16_t *>(x.data) + offset;
    if (x.dtype == ENCNET_FLOAT32)
        memcpy(static_cast<float *>(x.data) + offset, from, size_t(count) * 4);
    else if (x.dtype == ENCNET_FLOAT16)
        for (int64_t i = 0; i < count; ++i) to[i] = to_half(from[i]);
    else
        for (int64_t i = 0; i < count; ++i) to[i] = to_bfloat(from[i]);
}

// ------------------------------------------------------------------------------------------------------- memory

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t count) { return (count + WIDTH - 1) / WIDTH * WIDTH; }

// Floats in one allocation, handed out piece by piece; `data` is null where there was no memory.
class Memory {
  public:
    explicit Memory(int64_t floats) {
        if (posix_memalign(&data_, 64, size_t(floats) * 4)) data_ = nullptr;
        next_ = static_cast<float *>(data_);
    }
    ~Memory() { free(data_); }
    Memory(const Memory &) = delete;
    Memory &operator=(const Memory &) = delete;

    bool missing() const { return !data_; }
    float *take(int64_t floats) {
        float *piece = next_;
        next_ += floats;
        return piece;
    }

  private:
    void *data_ = nullptr;
    float *next_;
};

inline void clear(float *data, int64_t floats) { memset(data, 0, size_t(floats) * 4); }

// ----------------------------------------------------------------------------------------------------- the tile

// Up to TILE positions of x in scratch, in the order x has in memory: (D, TILE), or (TILE, padded D) for channels_last.
// Rows are one vector apart from a power of two, so that they do not all fall on the same few cache lines.
struct Tile {
    const encnet_features &x;
    const int64_t channels;
    const bool channels_last;
    const int64_t row;
    float *data, *norms;

    static bool is_channels_last(const encnet_features &x) { return x.position_stride != 1; }
    static int64_t row_floats(const encnet_features &x, int64_t channels) {
        return (is_channels_last(x) ? round_up(channels) : TILE) + WIDTH;
    }
    static int64_t data_floats(const encnet_features &x, int64_t channels) {
        return row_floats(x, channels) * (is_channels_last(x) ? TILE : channels);
    }
    static int64_t floats(const encnet_features &x, int64_t channels) { return data_floats(x, channels) + TILE; }

    Tile(const encnet_features &features, int64_t d, Memory &memory)
        : x(features), channels(d), channels_last(is_channels_last(features)), row(row_floats(features, d)),
          data(memory.take(data_floats(features, d))), norms(memory.take(TILE)) {}

    // The channels of contiguous memory are so far apart that no processor foresees the next one.
    void prefetch(int64_t offset) const {
        const int64_t size = x.dtype == ENCNET_FLOAT32 ? 4 : 2;
        const uintptr_t from = reinterpret_cast<uintptr_t>(x.data) + uintptr_t(offset * size);
        for (int64_t byte = 0; byte < TILE * size; byte += 64)
            __builtin_prefetch(reinterpret_cast<const void *>(from + uintptr_t(byte)));
    }

    // Copy `count` positions from the first one on, and their squared norms; what pads a row is zero.
    void read(int64_t image, int64_t first, int64_t count) {
        const int64_t start = image * x.batch_stride + first * x.position_stride;
        if (channels_last) {
            const int64_t padded = round_up(channels);
            for (int64_t t = 0; t < count; ++t) {
                float *to = data + t * row;
                read_run(x, start + t * x.position_stride, channels, to);
                clear(to + channels, padded - channels);
                Lanes squares{};
                for (int64_t d = 0; d < padded; d += WIDTH) squares += load(to + d) * load(to + d);
                norms[t] = sum(squares);
            }
            return;
        }
        clear(norms, TILE);
        for (int64_t d = 0; d < channels; ++d) {
            float *to = data + d * row;
            prefetch(start + (d + AHEAD) * x.channel_stride);
            read_run(x, start + d * x.channel_stride, count, to);
            if (count < TILE) clear(to + count, TILE - count);
            for (int64_t t = 0; t < TILE; t += WIDTH) store(norms + t, load(norms + t) + load(to + t) * load(to + t));
        }
    }

    // Write the tile, by now a gradient, to the same positions of `to`.
    void write(const encnet_features &to, int64_t image, int64_t first, int64_t count) const {
        const int64_t start = image * to.batch_stride + first * to.position_stride;
        if (channels_last)
            for (int64_t t = 0; t < count; ++t) write_run(to, start + t * to.position_stride, channels, data + t * row);
        else
            for (int64_t d = 0; d < channels; ++d) write_run(to, start + d * to.channel_stride, count, data + d * row);
    }

    Left by_position() const { return channels_last ? Left{data, row, 1} : Left{data, 1, row}; }
    Left by_channel() const { return channels_last ? Left{data, 1, row} : Left{data, row, 1}; }
};

// ---------------------------------------------------------------------------------------------------- codewords

// What all positions share, each padded from K to a multiple of WIDTH. A position's logits, less what they have in
// common (a softmax does not see it): shift ||x||^2 + slope x.c + offset. Without the common part, equal scales stay
// exact however long x is.
struct Codebook {
    int64_t lanes;
    float *shift, *slope, *offset, *norms;

    static int64_t floats(int64_t codewords) { return 4 * round_up(codewords); }

    Codebook(const encnet_sizes &sizes, const float *codewords, const float *scales, Memory &memory)
        : lanes(round_up(sizes.codewords)) {
        float **const pieces[] = {&shift, &slope, &offset, &norms};
        for (float **piece : pieces) {
            *piece = memory.take(lanes);
            clear(*piece, lanes);
        }
        float reference = scales[0];
        for (int64_t k = 1; k < sizes.codewords; ++k)
            if (scales[k] > reference) reference = scales[k];
        for (int64_t k = 0; k < lanes; ++k) {
            if (k >= sizes.codewords) {
                offset[k] = -INFINITY;  // a codeword that is not there gets no weight
                continue;
            }
            const float *c = codewords + k * sizes.channels;
            double norm = 0;
            for (int64_t d = 0; d < sizes.channels; ++d) norm += double(c[d]) * c[d];
            norms[k] = float(norm);
            shift[k] = scales[k] - reference;
            slope[k] = -2 * scales[k];
            offset[k] = scales[k] * norms[k];
        }
    }

    // weights[k] = softmax over codewords, from cross[k] = x.c_k of one position. They may be the same memory.
    void assign(float norm, const float *cross, float *weights) const {
        Lanes top = all(-INFINITY);
        for (int64_t k = 0; k < lanes; k += WIDTH) {
            const Lanes logits = load(shift + k) * norm + (load(slope + k) * load(cross + k) + load(offset + k));
            store(weights + k, logits);
            top = larger(logits, top);
        }
        const float most = largest(top);
        Lanes total{};
        for (int64_t k = 0; k < lanes; k += WIDTH) {
            const Lanes weight = exponential(load(weights + k) - most);
            store(weights + k, weight);
            total += weight;
        }
        const float share = 1 / sum(total);
        for (int64_t k = 0; k < lanes; k += WIDTH) store(weights + k, load(weights + k) * share);
    }
};

// (K, D) -> columns[d * stride + k], times a factor; what pads K is zero.
void transpose(const float *matrix, int64_t codewords, int64_t channels, float factor, float *columns, int64_t stride) {
    for (int64_t d = 0; d < channels; ++d) {
        clear(columns + d * stride, round_up(codewords));
        for (int64_t k = 0; k < codewords; ++k) columns[d * stride + k] = factor * matrix[k * channels + d];
    }
}

// ----------------------------------------------------------------------------------------------- cutting the work

// Item (image b, slice s) has number b * slices + s; group g takes a run of items in order and owns one set of partial
// sums. Where images are sliced, every item is a group of its own.
struct Plan {
    int64_t slices, items, groups, tiles;

    Plan(const encnet_sizes &sizes, int64_t partial_floats) {
        int64_t limit = PARTIAL_BYTES / (4 * partial_floats);
        limit = limit > MOST_GROUPS ? MOST_GROUPS : limit < FEWEST_GROUPS ? FEWEST_GROUPS : limit;
        tiles = (sizes.positions + TILE - 1) / TILE;
        slices = smaller(sizes.positions / SLICE, limit / sizes.batch);
        slices = slices < 1 ? 1 : slices;
        items = sizes.batch * slices;
        groups = smaller(items, limit);
    }
    int64_t first_item(int64_t group) const { return group * items / groups; }
    int64_t first_tile(int64_t slice) const { return slice * tiles / slices; }
};

void run(const encnet_threads *threads, int64_t count, encnet_task task, void *work) {
    if (threads && threads->run && count > 1)
        threads->run(threads->pool, size_t(count), task, work);
    else
        for (int64_t i = 0; i < count; ++i) task(work, size_t(i));
}

// ------------------------------------------------------------------------------------------------------- forward

struct Forward {
    const encnet_sizes &sizes;
    const encnet_features &x;
    const float *codewords;
    float *encoded;
    const Codebook &book;
    const float *columns;  // codewords as (D, lanes)
    const Plan &plan;
    float *partials;  // for each group sum_i A_ik x_id as (D, lanes), then sum_i A_ik
    bool no_memory;

    int64_t partial_floats() const { return (sizes.channels + 1) * book.lanes; }

    // encoded[b] from `count` partials that follow one another.
    void finish(int64_t image, const float *partial, int64_t count) const {
        const int64_t lanes = book.lanes, size = partial_floats();
        for (int64_t k = 0; k < sizes.codewords; ++k) {
            float mass = 0;
            for (int64_t s = 0; s < count; ++s) mass += partial[s * size + sizes.channels * lanes + k];
            float *row = encoded + (image * sizes.codewords + k) * sizes.channels;
            const float *c = codewords + k * sizes.channels;
            for (int64_t d = 0; d < sizes.channels; ++d) {
                float total = 0;
                for (int64_t s = 0; s < count; ++s) total += partial[s * size + d * lanes + k];
                row[d] = sizes.factor * (total - mass * c[d]);
            }
        }
    }

    void group(int64_t g) {
        const int64_t lanes = book.lanes;
        Memory memory(Tile::floats(x, sizes.channels) + TILE * lanes);
        if (memory.missing()) {
            __atomic_store_n(&no_memory, true, __ATOMIC_RELAXED);
            return;
        }
        Tile tile(x, sizes.channels, memory);
        float *weights = memory.take(TILE * lanes);
        float *partial = partials + g * partial_floats();
        float *mass = partial + sizes.channels * lanes;
        for (int64_t item = plan.first_item(g); item < plan.first_item(g + 1); ++item) {
            const int64_t image = item / plan.slices, slice = item % plan.slices;
            clear(partial, partial_floats());
            for (int64_t i = plan.first_tile(slice); i < plan.first_tile(slice + 1); ++i) {
                const int64_t count = smaller(TILE, sizes.positions - i * TILE);
                tile.read(image, i * TILE, count);
                product(count, lanes, sizes.channels, tile.by_position(), columns, lanes, weights, lanes, false);
                for (int64_t t = 0; t < count; ++t) {
                    float *row = weights + t * lanes;
                    book.assign(tile.norms[t], row, row);
                    for (int64_t k = 0; k < lanes; k += WIDTH) store(mass + k, load(mass + k) + load(row + k));
                }
                product(sizes.channels, lanes, count, tile.by_channel(), weights, lanes, partial, lanes, true);
            }
            if (plan.slices == 1) finish(image, partial, 1);
        }
    }
};

int encode(const encnet_sizes &sizes, const encnet_features &x, const float *codewords, const float *scale,
           float *encoded, const encnet_threads *threads) {
    if (sizes.batch == 0) return ENCNET_OK;
    const int64_t lanes = round_up(sizes.codewords), partial_floats = (sizes.channels + 1) * lanes;
    const Plan plan(sizes, partial_floats);
    Memory memory(Codebook::floats(sizes.codewords) + sizes.channels * lanes + plan.groups * partial_floats);
    if (memory.missing()) return ENCNET_NO_MEMORY;
    const Codebook book(sizes, codewords, scale, memory);
    float *columns = memory.take(sizes.channels * lanes);
    transpose(codewords, sizes.codewords, sizes.channels, 1, columns, lanes);
    Forward work{sizes, x, codewords, encoded, book, columns, plan, memory.take(plan.groups * partial_floats), false};

    const encnet_task group = [](void *w, size_t g) { static_cast<Forward *>(w)->group(int64_t(g)); };
    run(threads, plan.groups, group, &work);
    if (work.no_memory) return ENCNET_NO_MEMORY;
    if (plan.slices == 1) return ENCNET_OK;
    const encnet_task finish = [](void *w, size_t image) {
        const Forward &forward = *static_cast<Forward *>(w);
        const int64_t slices = forward.plan.slices;
        forward.finish(int64_t(image), forward.partials + int64_t(image) * slices * forward.partial_floats(), slices);
    };
    run(threads, sizes.batch, finish, &work);
    return ENCNET_OK;
}

// ------------------------------------------------------------------------------------------------------ backward

// With G = factor * grad, P_ik = (x_i - c_k).G_k, Q_ik = A_ik (P_ik - sum_k A_ik P_ik), W_ik = 2 scale_k Q_ik:
//     dx_i = sum_k A_ik G_k - sum_k W_ik c_k + (sum_k W_ik) x_i
//     dc_k = -sum_i A_ik G_k - sum_i W_ik x_i + (sum_i W_ik) c_k
//     dscale_k = sum_i Q_ik d_ik
struct Backward {
    const encnet_sizes &sizes;
    const encnet_features &x;
    const float *codewords, *grad;
    const encnet_features &grad_x;
    float *grad_codewords, *grad_scale;
    const Codebook &book;
    const Plan &plan;
    float *partials;  // for each group dc as (D, lanes), then dscale
    bool no_memory;

    int64_t partial_floats() const { return (sizes.channels + 1) * book.lanes; }

    // Codewords and G of one image side by side, as (D, 2 lanes), and for channels_last also as (2 lanes, padded D).
    struct Pair {
        const Backward &all;
        const int64_t lanes, row;
        float *columns, *rows, *products;  // products: c_k.G_k

        static int64_t floats(const Backward &work, bool channels_last) {
            const int64_t both = 2 * work.book.lanes, d = work.sizes.channels;
            return both * d + (channels_last ? both * round_up(d) : 0) + work.book.lanes;
        }
        Pair(const Backward &work, bool channels_last, Memory &memory)
            : all(work), lanes(work.book.lanes), row(round_up(work.sizes.channels)),
              columns(memory.take(2 * lanes * work.sizes.channels)),
              rows(channels_last ? memory.take(2 * lanes * row) : nullptr), products(memory.take(lanes)) {
            const int64_t k = work.sizes.codewords, d = work.sizes.channels;
            transpose(work.codewords, k, d, 1, columns, 2 * lanes);
            if (!rows) return;
            clear(rows, 2 * lanes * row);
            for (int64_t i = 0; i < k; ++i) memcpy(rows + i * row, work.codewords + i * d, size_t(d) * 4);
        }
        void set_image(int64_t image) {
            const int64_t k = all.sizes.codewords, d = all.sizes.channels;
            const float factor = all.sizes.factor, *g = all.grad + image * k * d;
            transpose(g, k, d, factor, columns + lanes, 2 * lanes);
            clear(products, lanes);
            for (int64_t i = 0; i < k; ++i) {
                float total = 0;
                for (int64_t j = 0; j < d; ++j) {
                    const float value = factor * g[i * d + j];
                    if (rows) rows[(lanes + i) * row + j] = value;
                    total += value * all.codewords[i * d + j];
                }
                products[i] = total;
            }
        }
    };

    // One position. `row`: cross x.c and x.G in, -W and A out, each `lanes` long. Returns sum_k W.
    float position(float norm, const Pair &pair, float *row, float *weights, float *sums, float *scale_sums) const {
        const int64_t lanes = book.lanes;
        book.assign(norm, row, weights);
        Lanes mean{};
        for (int64_t k = 0; k < lanes; k += WIDTH)
            mean += load(weights + k) * (load(row + lanes + k) - load(pair.products + k));
        const float delta = sum(mean);
        Lanes total{};
        for (int64_t k = 0; k < lanes; k += WIDTH) {
            const Lanes weight = load(weights + k);
            const Lanes q = weight * (load(row + lanes + k) - load(pair.products + k) - delta);
            const Lanes minus_w = load(book.slope + k) * q;
            const Lanes distance = norm - 2 * load(row + k) + load(book.norms + k);
            store(scale_sums + k, load(scale_sums + k) + q * distance);
            store(sums + k, load(sums + k) + minus_w);
            store(sums + lanes + k, load(sums + lanes + k) + weight);
            store(row + k, minus_w);
            store(row + lanes + k, weight);
            total -= minus_w;
        }
        return sum(total);
    }

    void group(int64_t g) {
        const int64_t lanes = book.lanes, both = 2 * lanes, channels = sizes.channels;
        const bool channels_last = Tile::is_channels_last(x);
        Memory memory(Tile::floats(x, channels) + Pair::floats(*this, channels_last) + TILE + 3 * lanes +
                      TILE * both * (channels_last ? 1 : 2));
        if (memory.missing()) {
            __atomic_store_n(&no_memory, true, __ATOMIC_RELAXED);
            return;
        }
        Tile tile(x, channels, memory);
        Pair pair(*this, channels_last, memory);
        float *totals = memory.take(TILE);  // sum_k W of each position
        float *sums = memory.take(both);    // sum_i of -W and of A
        float *weights = memory.take(lanes);
        float *rows = memory.take(TILE * both);
        float *by_codeword = channels_last ? nullptr : memory.take(TILE * both);
        float *partial = partials + g * partial_floats();
        clear(partial, partial_floats());
        int64_t previous = -1;
        for (int64_t item = plan.first_item(g); item < plan.first_item(g + 1); ++item) {
            const int64_t image = item / plan.slices, slice = item % plan.slices;
            if (image != previous) pair.set_image(image);
            previous = image;
            clear(sums, both);
            for (int64_t i = plan.first_tile(slice); i < plan.first_tile(slice + 1); ++i) {
                const int64_t count = smaller(TILE, sizes.positions - i * TILE);
                tile.read(image, i * TILE, count);
                product(count, both, channels, tile.by_position(), pair.columns, both, rows, both, false);
                for (int64_t t = 0; t < count; ++t)
                    totals[t] = position(tile.norms[t], pair, rows + t * both, weights, sums, partial + channels * lanes);
                product(channels, lanes, count, tile.by_channel(), rows, both, partial, lanes, true);
                if (channels_last)
                    gradient_by_channel(tile, count, pair, rows, totals);
                else
                    gradient_by_position(tile, count, pair, rows, by_codeword, totals);
                tile.write(grad_x, image, i * TILE, count);
            }
            for (int64_t d = 0; d < channels; ++d) {
                const float *c = pair.columns + d * both, *gradient = c + lanes;
                float *row = partial + d * lanes;
                for (int64_t k = 0; k < lanes; k += WIDTH)
                    store(row + k, load(row + k) - load(sums + k) * load(c + k) -
                                       load(sums + lanes + k) * load(gradient + k));
            }
        }
    }

    // The tile (D, TILE) becomes its gradient: lanes along positions.
    void gradient_by_position(Tile &tile, int64_t count, const Pair &pair, const float *rows, float *by_codeword,
                              float *totals) const {
        const int64_t both = 2 * book.lanes, padded = round_up(count);
        for (int64_t t = 0; t < padded; ++t) {
            if (t >= count) totals[t] = 0;
            for (int64_t k = 0; k < both; ++k) by_codeword[k * TILE + t] = t < count ? rows[t * both + k] : 0;
        }
        for (int64_t d = 0; d < sizes.channels; ++d) {
            float *row = tile.data + d * tile.row;
            for (int64_t t = 0; t < padded; t += WIDTH) store(row + t, load(row + t) * load(totals + t));
        }
        const Left left{pair.columns, both, 1};
        product(sizes.channels, padded, both, left, by_codeword, TILE, tile.data, tile.row, true);
    }

    // The tile (TILE, padded D) becomes its gradient: lanes along channels.
    void gradient_by_channel(Tile &tile, int64_t count, const Pair &pair, const float *rows, const float *totals) const {
        const int64_t both = 2 * book.lanes, padded = round_up(sizes.channels);
        for (int64_t t = 0; t < count; ++t) {
            float *row = tile.data + t * tile.row;
            for (int64_t d = 0; d < padded; d += WIDTH) store(row + d, load(row + d) * totals[t]);
        }
        product(count, padded, both, Left{rows, both, 1}, pair.rows, pair.row, tile.data, tile.row, true);
    }

    void finish() const {
        const int64_t lanes = book.lanes, size = partial_floats();
        for (int64_t k = 0; k < sizes.codewords; ++k) {
            for (int64_t d = 0; d <= sizes.channels; ++d) {
                float total = 0;
                for (int64_t g = 0; g < plan.groups; ++g) total += partials[g * size + d * lanes + k];
                (d < sizes.channels ? grad_codewords[k * sizes.channels + d] : grad_scale[k]) = total;
            }
        }
    }
};

int encode_backward(const encnet_sizes &sizes, const encnet_features &x, const float *codewords, const float *scale,
                    const float *grad, const encnet_features &grad_x, float *grad_codewords, float *grad_scale,
                    const encnet_threads *threads) {
    if (sizes.batch == 0) {
        clear(grad_codewords, sizes.codewords * sizes.channels);
        clear(grad_scale, sizes.codewords);
        return ENCNET_OK;
    }
    const int64_t partial_floats = (sizes.channels + 1) * round_up(sizes.codewords);
    const Plan plan(sizes, partial_floats);
    Memory memory(Codebook::floats(sizes.codewords) + plan.groups * partial_floats);
    if (memory.missing()) return ENCNET_NO_MEMORY;
    const Codebook book(sizes, codewords, scale, memory);
    Backward work{sizes, x,    codewords, grad, grad_x, grad_codewords, grad_scale,
                  book,  plan, memory.take(plan.groups * partial_floats), false};
    const encnet_task group = [](void *w, size_t g) { static_cast<Backward *>(w)->group(int64_t(g)); };
    run(threads, plan.groups, group, &work);
    if (work.no_memory) return ENCNET_NO_MEMORY;
    work.finish();
    return ENCNET_OK;
}

}  // namespace

#define NAME_OF(instructions) cpu_kernels_##instructions
#define KERNELS(instructions) NAME_OF(instructions)

extern const CpuKernels KERNELS(ENCNET_INSTRUCTIONS) = {encode, encode_backward};
