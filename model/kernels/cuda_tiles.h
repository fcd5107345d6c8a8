// The Encoding op on tensor cores, for D <= 512 and K <= 64 where the codewords (going backward the gradient, too) fit into
// shared memory beside a tile: README.md says which do. A tile of positions is copied there once, and norms, distances,
// weights, sums and gradients are all made from that copy, so that x crosses device memory once in either pass. The next
// tile arrives meanwhile. Nothing of a tile but its gradient goes back.
//
// Work is cut into items: one image, or one of `parts` parts of it. A cluster of blocks takes items in order, its blocks
// take that item's tiles in turns, and at the end the blocks add up what each has in registers, in the order of their
// ranks, through one another's shared memory. Where several clusters share a result, each leaves a partial sum in the
// workspace and encoding_cuda.cu's `add_*` kernels sum these in order. No sum depends on timing.
//
// Matrices are padded with zeros: D to a multiple of 16, K to 16, 32 or 64; what pads K gets no weight.
#pragma once

#include <math.h>

#include <type_traits>

#include "cuda_device.h"

namespace {

constexpr int WARPS = 16, THREADS = 32 * WARPS;
constexpr int MOST_CHANNELS = 512;
constexpr int MINE = MOST_CHANNELS / 16 / WARPS;  // groups of 16 channels that one warp owns: warp, warp + WARPS, ...
constexpr int CHUNK_BYTES = 16;

// Arguments of both kernels. A row of x is what follows one another in memory: the positions of a channel, or
// (channels_last) the channels of a position. `vector` is the number of bytes that every row allows to move at once.
struct Rows {
    void *data;
    int64_t image_stride, row_stride;
    int vector;
};

struct Task {
    Rows x, grad_x;
    const float *codewords, *scale, *grad;
    float *result, *scale_result;  // encoded; or gradients of codewords and scale. Null: leave a partial sum
    float *partials;               // for each item (forward) or cluster (backward) K * D floats, then K more
    int64_t batch, positions, tiles, parts;
    int channels, depth, codewords_count, stages, cluster;
    float factor;
};

DEVICE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// ----------------------------------------------------------------------------------------- matrices in shared memory

template <typename Element>
constexpr int CHUNK = CHUNK_BYTES / int(sizeof(Element));

// A row is an odd number of 16-byte chunks long, so that the same column of 8 rows lies in 8 different groups of banks.
template <typename Element>
struct Padded {
    Element *data;
    int pitch;

    DEVICE Element *at(int row, int column) const { return data + row * pitch + column; }
};

template <typename Element>
__host__ __device__ constexpr int padded(int columns) {
    return columns + CHUNK<Element>;
}

// The same for rows of a power of two of elements without padding: chunks change places from row to row.
template <typename Element, int COLUMNS>
struct Swizzled {
    static constexpr int CHUNKS = COLUMNS / CHUNK<Element>, PLACES = CHUNKS < 8 ? CHUNKS : 8, ROWS = 8 / PLACES;
    Element *data;

    DEVICE Element *at(int row, int column) const {
        const int chunk = column / CHUNK<Element> ^ (row / ROWS & (PLACES - 1));
        return data + row * COLUMNS + chunk * CHUNK<Element> + column % CHUNK<Element>;
    }
};

// ------------------------------------------------------------------------------------------------------- fragments

// What mma wants in registers, for half types (16 deep) and for float32 (8 deep, two tf32 parts of every number).
template <typename Element>
struct Fragments {
    static constexpr int DEPTH = 16;
    using Left = uint32_t[4];
    using Right = uint32_t[2];

    // (16, DEPTH) of a matrix from (row, column) on; TRANSPOSED where shared memory holds its transpose.
    template <bool TRANSPOSED, typename Store>
    static DEVICE void load(Left &to, const Store &store, int row, int column, int lane) {
        const int within = lane & 7, down = lane & 8, right = (lane & 16) / 2;
        const Element *from = TRANSPOSED ? store.at(column + within + right, row + down)
                                         : store.at(row + within + down, column + right);
        load_matrices<TRANSPOSED>(to, from);
    }

    // (DEPTH, 8 COUNT) from (row, column) on; TRANSPOSED where shared memory holds its transpose.
    template <bool TRANSPOSED, int COUNT, typename Store>
    static DEVICE void load(Right (&to)[COUNT], const Store &store, int row, int column, int lane) {
        const int within = lane & 7, first = lane & 8, second = (lane & 16) / 2;
#pragma unroll
        for (int n = 0; n + 1 < COUNT; n += 2) {
            const Element *from = TRANSPOSED ? store.at(column + 8 * n + within + second, row + first)
                                             : store.at(row + within + first, column + 8 * n + second);
            uint32_t pair[4];
            load_matrices<!TRANSPOSED>(pair, from);
            to[n][0] = pair[0], to[n][1] = pair[1], to[n + 1][0] = pair[2], to[n + 1][1] = pair[3];
        }
        if constexpr (COUNT % 2) {
            constexpr int n = COUNT - 1;
            const Element *from = TRANSPOSED ? store.at(column + 8 * n + within, row + first)
                                             : store.at(row + within + first, column + 8 * n);
            load_matrices<!TRANSPOSED>(to[n], from);
        }
    }

    static DEVICE void multiply(float (&sums)[4], const Left &left, const Right &right) {
        multiply_halves<Element>(sums, left, right);
    }

    // Add the squares of rows lane / 4 (upper) and lane / 4 + 8 (lower) that this lane holds.
    static DEVICE void square(const Left &left, float &upper, float &lower) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 pair = widen_pair<Element>(left[i]);
            float &sum = i % 2 ? lower : upper;
            sum += pair.x * pair.x;
            sum += pair.y * pair.y;
        }
    }
};

template <>
struct Fragments<float> {
    static constexpr int DEPTH = 8;
    using Left = float[4];
    using Right = float[2];

    template <bool TRANSPOSED, typename Store>
    static DEVICE void load(Left &to, const Store &store, int row, int column, int lane) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int r = row + lane / 4 + i % 2 * 8, c = column + lane % 4 + i / 2 * 4;
            to[i] = TRANSPOSED ? *store.at(c, r) : *store.at(r, c);
        }
    }

    template <bool TRANSPOSED, int COUNT, typename Store>
    static DEVICE void load(Right (&to)[COUNT], const Store &store, int row, int column, int lane) {
#pragma unroll
        for (int n = 0; n < COUNT; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int r = row + lane % 4 + 4 * i, c = column + 8 * n + lane / 4;
                to[n][i] = TRANSPOSED ? *store.at(c, r) : *store.at(r, c);
            }
    }

    // A NaN of the device's own (all ones) becomes -0 here. Lengths, norms and masses are not rounded so and carry it on.
    static DEVICE uint32_t tf32(float value) { return (float_bits(value) + 0x1000u) & 0xffffe000u; }

    // number = large + small to 22 bits; of the four products the smallest is left out. Tensor cores cut sums off where
    // float32 arithmetic rounds them, so a sum of only three products is made there and added here.
    static DEVICE void multiply(float (&sums)[4], const Left &left, const Right &right) {
        uint32_t large[4], small[4], right_large[2], right_small[2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            large[i] = tf32(left[i]);
            small[i] = tf32(left[i] - bits_float(large[i]));
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            right_large[i] = tf32(right[i]);
            right_small[i] = tf32(right[i] - bits_float(right_large[i]));
        }
        float products[4] = {0, 0, 0, 0};
        multiply_tf32(products, small, right_large);
        multiply_tf32(products, large, right_small);
        multiply_tf32(products, large, right_large);
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i] += products[i];
    }

    static DEVICE void square(const Left &left, float &upper, float &lower) {
#pragma unroll
        for (int i = 0; i < 4; ++i) (i % 2 ? lower : upper) += left[i] * left[i];
    }
};

// sums[j][n], the 16 channels of this warp's group j by columns 8 n to 8 n + 7, += left right; left is (channels, steps *
// DEPTH), right (steps * DEPTH, 8 COUNT) from `column` on.
template <typename Element, bool LEFT_TRANSPOSED, bool RIGHT_TRANSPOSED, int COUNT, typename LeftStore,
          typename RightStore>
DEVICE void accumulate(float (&sums)[MINE][COUNT][4], const LeftStore &left, const RightStore &right, int steps,
                       int groups, int warp, int lane) {
    using F = Fragments<Element>;
#pragma unroll 2
    for (int step = 0; step < steps; ++step) {
        typename F::Right columns[COUNT];
        F::template load<RIGHT_TRANSPOSED>(columns, right, step * F::DEPTH, 0, lane);
#pragma unroll
        for (int j = 0; j < MINE; ++j) {
            const int group = warp + j * WARPS;
            if (group >= groups) continue;
            typename F::Left rows;
            F::template load<LEFT_TRANSPOSED>(rows, left, 16 * group, step * F::DEPTH, lane);
#pragma unroll
            for (int n = 0; n < COUNT; ++n) F::multiply(sums[j][n], rows, columns[n]);
        }
    }
}

// --------------------------------------------------------------------------------------------------- the tile's copy

template <typename Element, bool CHANNELS_LAST, int T>
struct Tile {
    using Number = Element;
    static constexpr bool PAIRS = !CHANNELS_LAST && sizeof(Element) == 2;  // two positions are one word
    using Store = typename std::conditional<CHANNELS_LAST, Padded<Element>, Swizzled<Element, T>>::type;

    static __host__ __device__ int64_t elements(int depth) {
        return CHANNELS_LAST ? int64_t(T) * padded<Element>(depth) : int64_t(T) * depth;
    }
    static DEVICE Store store(Element *data, int depth) {
        if constexpr (CHANNELS_LAST)
            return {data, padded<Element>(depth)};
        else
            return {data};
    }
    static DEVICE Element *at(const Store &store, int position, int channel) {
        return CHANNELS_LAST ? store.at(position, channel) : store.at(channel, position);
    }

    // Call move(row, column, at, valid) for every BYTES of the tile, shared out among the threads: elements column to column
    // + BYTES / size of a row, in memory from element `at` on, of which the first `valid` (0 and less: none) are there and
    // the rest pads.
    template <int BYTES, int AT_ONCE, typename Move>
    static DEVICE void each(const Task &task, const Rows &memory, int64_t image, int64_t tile, Move move) {
        constexpr int STEP = BYTES / int(sizeof(Element));
        const int count = int(least(T, task.positions - tile * T));
        const int rows = CHANNELS_LAST ? T : task.depth, columns = CHANNELS_LAST ? task.depth : T;
        const int valid_rows = CHANNELS_LAST ? count : task.channels, valid = CHANNELS_LAST ? task.channels : count;
        const int steps = columns / STEP, thread = int(threadIdx.x);
        const int64_t begin = image * memory.image_stride + tile * T * (CHANNELS_LAST ? memory.row_stride : 1);
        bool keeps = true;  // each thread to a column: it adds where others divide
        if constexpr (CHANNELS_LAST) keeps = THREADS % steps == 0;
        if (keeps) {
            const int column = thread % steps * STEP, apart = THREADS / steps;
            const int here = valid - column < STEP ? valid - column : STEP;
            int row = thread / steps;
            int64_t at = begin + row * memory.row_stride + column;
            const int64_t stride = apart * memory.row_stride;
#pragma unroll AT_ONCE
            for (; row < rows; row += apart, at += stride) move(row, column, at, row < valid_rows ? here : 0);
        } else {
#pragma unroll 1
            for (int index = thread; index < rows * steps; index += THREADS) {
                const int row = index / steps, column = index % steps * STEP;
                const int here = row < valid_rows ? valid - column : 0;
                move(row, column, begin + row * memory.row_stride + column, here < STEP ? here : STEP);
            }
        }
    }

    template <int BYTES>
    static DEVICE void fetch_vectors(const Task &task, const Store &store, int64_t image, int64_t tile) {
        const Element *x = static_cast<const Element *>(task.x.data);
        each<BYTES, 4>(task, task.x, image, tile, [&](int row, int column, int64_t at, int valid) {
            const Element *from = valid > 0 ? x + at : x;
            Element *to = store.at(row, column);
            if constexpr (BYTES >= 4)
                copy_async<BYTES>(to, from, valid > 0 ? valid * int(sizeof(Element)) : 0);
            else
                *to = valid > 0 ? *from : narrow<Element>(0);
        });
    }

    // Begin to copy a tile of x into shared memory.
    static DEVICE void fetch(const Task &task, const Store &store, int64_t image, int64_t tile) {
        if (task.x.vector == 16)
            fetch_vectors<16>(task, store, image, tile);
        else if (task.x.vector == 8)
            fetch_vectors<8>(task, store, image, tile);
        else if (task.x.vector == 4)
            fetch_vectors<4>(task, store, image, tile);
        else if constexpr (sizeof(Element) == 2)
            fetch_vectors<2>(task, store, image, tile);
    }

    template <typename Vector>
    static DEVICE void write_vectors(const Task &task, const Store &store, int64_t image, int64_t tile) {
        constexpr int STEP = int(sizeof(Vector) / sizeof(Element));
        Element *grad_x = static_cast<Element *>(task.grad_x.data);
        each<int(sizeof(Vector)), 2>(task, task.grad_x, image, tile, [&](int row, int column, int64_t at, int valid) {
            if (valid <= 0) return;
            Element *to = grad_x + at;
            const Element *from = store.at(row, column);
            if (valid == STEP)
                *reinterpret_cast<Vector *>(to) = *reinterpret_cast<const Vector *>(from);
            else
                for (int i = 0; i < valid; ++i) to[i] = from[i];
        });
    }

    // Copy shared memory, by now a gradient, to the same positions of grad_x.
    static DEVICE void write(const Task &task, const Store &store, int64_t image, int64_t tile) {
        if (task.grad_x.vector == 16)
            write_vectors<uint4>(task, store, image, tile);
        else if (task.grad_x.vector == 8)
            write_vectors<uint2>(task, store, image, tile);
        else if (task.grad_x.vector == 4)
            write_vectors<uint32_t>(task, store, image, tile);
        else if constexpr (sizeof(Element) == 2)
            write_vectors<uint16_t>(task, store, image, tile);
    }
};

// ---------------------------------------------------------------------------------------------------- shared memory

// R is the number of rows that are multiplied with x: K codewords, and in the backward pass K rows of the gradient below.
// PARTS warps share the channels of one piece of x.c, each for a sum of its own: few take less memory, many read less.
template <typename Element, bool CHANNELS_LAST, int K, int T, int PARTS, bool BACKWARD>
struct Shared {
    static constexpr int R = BACKWARD ? 2 * K : K, PRODUCTS_PITCH = R + 8;
    static constexpr int SLICE = T == 16 ? 8 : K < T ? K : T;  // codewords whose sums are staged at once, going forward
    using TileOf = Tile<Element, CHANNELS_LAST, T>;

    float *shift, *slope, *offset, *norms, *cross;  // (K,) each: see encoding_cpu.cpp's Codebook; cross: c_k.G_k
    float *sums;                                    // (2 K,): what positions add up to
    float *totals;                                  // (T,): sum_k W of each position
    float *lengths;                                 // (PARTS, T): parts of the squared norms of x
    Padded<Element> codes;                          // (R, depth)
    Padded<Element> weights;                        // (T, R)
    float *products;                                // (PARTS, T, PRODUCTS_PITCH): parts of x codes'
    Element *tiles;                                 // stages of x
    // Sums on their way to other blocks, when all tiles are done. Forward (SLICE, depth + 4) from `tiles` on; backward
    // (K, depth + 4) in place of `codes`, whose 2 K rows are longer and which no tile needs any more.
    float *staged;

    static __host__ __device__ int64_t fixed_bytes(int depth) {
        return 4 * (7 * K + T + PARTS * T) + int64_t(sizeof(Element)) * R * padded<Element>(depth);
    }
    static __host__ __device__ int64_t work_bytes(int depth, int stages) {
        const int64_t work = int64_t(sizeof(Element)) * (stages * TileOf::elements(depth) + T * padded<Element>(R)) +
                             4 * PARTS * T * PRODUCTS_PITCH;
        const int64_t staging = BACKWARD ? 0 : int64_t(4) * SLICE * (depth + 4);
        return work > staging ? work : staging;
    }

    explicit DEVICE Shared(const Task &task) {
        float *floats = reinterpret_cast<float *>(shared_memory());
        float **const pieces[] = {&shift, &slope, &offset, &norms, &cross};
#pragma unroll
        for (float **piece : pieces) {
            *piece = floats;
            floats += K;
        }
        sums = floats, floats += 2 * K;
        totals = floats, floats += T;
        lengths = floats, floats += PARTS * T;
        codes = {reinterpret_cast<Element *>(floats), padded<Element>(task.depth)};
        Element *work = codes.data + R * codes.pitch;
        staged = reinterpret_cast<float *>(BACKWARD ? codes.data : work);
        tiles = work, work += task.stages * TileOf::elements(task.depth);
        weights = {work, padded<Element>(R)}, work += T * weights.pitch;
        products = reinterpret_cast<float *>(work);
    }

    DEVICE typename TileOf::Store tile(const Task &task, int stage) const {
        return TileOf::store(tiles + stage * TileOf::elements(task.depth), task.depth);
    }
};

// Rows first_row to first_row + K of `codes` from a (K, D) matrix times a factor, rounded once, padded with zeros.
template <typename Element, int K>
DEVICE void load_codes(const Task &task, const Padded<Element> &codes, int first_row, const float *matrix, float factor) {
    for (int index = int(threadIdx.x); index < K * task.depth; index += THREADS) {
        const int k = index / task.depth, d = index % task.depth;
        const bool real = k < task.codewords_count && d < task.channels;
        *codes.at(first_row + k, d) = narrow<Element>(real ? matrix[k * task.channels + d] * factor : 0);
    }
}

// to[k] = row k . row other + k of codes, for one warp's k.
template <typename Element, int K>
DEVICE void dot_rows(const Task &task, const Padded<Element> &codes, int other, float *to, int warp, int lane) {
    for (int k = warp; k < K; k += WARPS) {
        float sum = 0;
        for (int d = lane; d < task.depth; d += 32) sum += widen(*codes.at(k, d)) * widen(*codes.at(other + k, d));
        for (int distance = 16; distance; distance /= 2) sum += shuffle(sum, distance);
        if (lane == 0) to[k] = sum;
    }
}

// Codewords into shared memory, and what a position's logits need of them. Ends with a barrier.
template <typename Element, bool CHANNELS_LAST, int K, int T, int PARTS, bool BACKWARD>
DEVICE void prepare(const Task &task, const Shared<Element, CHANNELS_LAST, K, T, PARTS, BACKWARD> &shared) {
    const int thread = int(threadIdx.x);
    load_codes<Element, K>(task, shared.codes, 0, task.codewords, 1);
    __syncthreads();
    dot_rows<Element, K>(task, shared.codes, 0, shared.norms, thread / 32, thread % 32);
    __syncthreads();
    if (thread < K) {
        const bool real = thread < task.codewords_count;
        float reference = task.scale[0];
        for (int k = 1; k < task.codewords_count; ++k) reference = fmaxf(reference, task.scale[k]);
        const float scale = real ? task.scale[thread] : 0;
        shared.shift[thread] = real ? scale - reference : 0;
        shared.slope[thread] = -2 * scale;
        shared.offset[thread] = real ? scale * shared.norms[thread] : -INFINITY;
    }
    __syncthreads();
}

// products and lengths of one tile. The warps divide positions, rows of codes and channels among them.
template <typename Element, bool CHANNELS_LAST, int K, int T, int PARTS, bool BACKWARD>
DEVICE void multiply_tile(const Task &task, const Shared<Element, CHANNELS_LAST, K, T, PARTS, BACKWARD> &shared,
                          const typename Tile<Element, CHANNELS_LAST, T>::Store &tile, int warp, int lane) {
    using S = Shared<Element, CHANNELS_LAST, K, T, PARTS, BACKWARD>;
    using F = Fragments<Element>;
    constexpr int POSITION_WARPS = T / 16, ROW_WARPS = WARPS / PARTS / POSITION_WARPS;
    constexpr int COUNT = S::R / 8 / ROW_WARPS;
    static_assert(COUNT >= 1 && COUNT * 8 * ROW_WARPS == S::R, "warps do not divide the rows of codes");
    const int position = 16 * (warp % POSITION_WARPS);
    const int row = 8 * COUNT * (warp / POSITION_WARPS % ROW_WARPS);
    const int part = warp / (POSITION_WARPS * ROW_WARPS);
    float sums[COUNT][4] = {}, upper = 0, lower = 0;
#pragma unroll 2
    for (int d = part * F::DEPTH; d < task.depth; d += PARTS * F::DEPTH) {
        typename F::Left left;
        typename F::Right right[COUNT];
        F::template load<!CHANNELS_LAST>(left, tile, position, d, lane);
        F::template load<true>(right, shared.codes, d, row, lane);
        F::square(left, upper, lower);
#pragma unroll
        for (int n = 0; n < COUNT; ++n) F::multiply(sums[n], left, right[n]);
    }
    const int i = position + lane / 4;
    float *products = shared.products + (part * T + i) * S::PRODUCTS_PITCH + row + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < COUNT; ++n) {
        *reinterpret_cast<float2 *>(products + 8 * n) = make_float2(sums[n][0], sums[n][1]);
        *reinterpret_cast<float2 *>(products + 8 * n + 8 * S::PRODUCTS_PITCH) = make_float2(sums[n][2], sums[n][3]);
    }
    if (row == 0) {
        for (int distance = 1; distance < 4; distance *= 2) {
            upper += shuffle(upper, distance);
            lower += shuffle(lower, distance);
        }
        if (lane % 4 == 0) {
            shared.lengths[part * T + i] = upper;
            shared.lengths[part * T + i + 8] = lower;
        }
    }
}

// One position's codewords, shared out among LANES threads that follow one another: `lane`, `lane` + LANES, ...
template <int K, int T>
struct Position {
    static constexpr int LANES = THREADS / T, EACH = (K + LANES - 1) / LANES;
    static_assert(LANES <= 32 && LANES >= 4, "a position's threads must be within one warp");

    static DEVICE float sum(float value) {
#pragma unroll
        for (int distance = 1; distance < LANES; distance *= 2) value += shuffle(value, distance);
        return value;
    }
    static DEVICE float largest(float value) {
#pragma unroll
        for (int distance = 1; distance < LANES; distance *= 2) value = fmaxf(value, shuffle(value, distance));
        return value;
    }
};

// Weights of position i from its products; `length` and `cross` (x.c) are handed on for the gradient.
template <typename Element, bool CHANNELS_LAST, int K, int T, int PARTS, bool BACKWARD>
DEVICE void assign(const Shared<Element, CHANNELS_LAST, K, T, PARTS, BACKWARD> &shared, int i, int lane, bool real,
                   float (&weights)[Position<K, T>::EACH], float (&cross)[Position<K, T>::EACH], float &length) {
    using S = Shared<Element, CHANNELS_LAST, K, T, PARTS, BACKWARD>;
    using P = Position<K, T>;
    length = 0;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) length += shared.lengths[part * T + i];
    float top = -INFINITY, total = 0;
#pragma unroll
    for (int j = 0; j < P::EACH; ++j) {
        const int k = lane + j * P::LANES;
        cross[j] = 0;
        weights[j] = -INFINITY;
        if (k >= K) continue;
#pragma unroll
        for (int part = 0; part < PARTS; ++part)
            cross[j] += shared.products[(part * T + i) * S::PRODUCTS_PITCH + k];
        weights[j] = shared.shift[k] * length + (shared.slope[k] * cross[j] + shared.offset[k]);
        top = fmaxf(top, weights[j]);
    }
    top = P::largest(top);
#pragma unroll
    for (int j = 0; j < P::EACH; ++j) {
        weights[j] = expf(weights[j] - top);
        total += lane + j * P::LANES < K ? weights[j] : 0;
    }
    total = P::sum(total);
#pragma unroll
    for (int j = 0; j < P::EACH; ++j) weights[j] = real ? weights[j] / total : 0;
}

// to[k] = sum over the tile's positions of `mine`, which each thread holds for its codewords: through `scratch`, (T, K).
template <int K, int T>
DEVICE void add_positions(const float (&mine)[Position<K, T>::EACH], float *scratch, float *to) {
    using P = Position<K, T>;
    const int thread = int(threadIdx.x), i = thread / P::LANES, lane = thread % P::LANES;
    __syncthreads();
#pragma unroll
    for (int j = 0; j < P::EACH; ++j)
        if (lane + j * P::LANES < K) scratch[i * K + lane + j * P::LANES] = mine[j];
    __syncthreads();
    if (thread < K) {
        float sum = 0;
        for (int t = 0; t < T; ++t) sum += scratch[t * K + thread];
        to[thread] = sum;
    }
    __syncthreads();
}

// The tiles of an item that fall to this block: first, first + stride, ... up to the image's last one.
struct Turns {
    int64_t image, first, stride, count;

    DEVICE Turns(const Task &task, int64_t item) {
        image = item / task.parts;
        first = item % task.parts * task.cluster + cluster_rank();
        stride = task.parts * task.cluster;
        count = first < task.tiles ? (task.tiles - first + stride - 1) / stride : 0;
    }
    DEVICE int64_t tile(int64_t turn) const { return first + turn * stride; }
};

// Begin to fetch the first tiles of an item.
template <typename S>
DEVICE void begin_tiles(const Task &task, const S &shared, const Turns &turns) {
    for (int stage = 0; stage < task.stages; ++stage) {
        if (stage < turns.count) S::TileOf::fetch(task, shared.tile(task, stage), turns.image, turns.tile(stage));
        copies_commit();
    }
}

// Go through the tiles of an item after begin_tiles, fetching ahead; compute(tile's store, tile's number) may change the
// store.
template <typename S, typename Compute>
DEVICE void each_tile(const Task &task, const S &shared, const Turns &turns, Compute compute) {
    using TileOf = typename S::TileOf;
    int stage = 0;
    for (int64_t turn = 0; turn < turns.count; ++turn) {
        if (task.stages == 2)
            copies_wait<1>();
        else
            copies_wait<0>();
        __syncthreads();
        const auto store = shared.tile(task, stage);
        compute(store, turns.tile(turn));
        __syncthreads();
        const int64_t next = turn + task.stages;
        if (next < turns.count) TileOf::fetch(task, store, turns.image, turns.tile(next));
        copies_commit();
        stage = stage + 1 < task.stages ? stage + 1 : 0;
    }
    copies_wait<0>();
    __syncthreads();
}

// COUNT codewords of the fragments `sums`, from `first` on, into `staged` (COUNT, depth + 4), times a factor.
template <int COUNT, int K>
DEVICE void stage_sums(const Task &task, float *staged, const float (&sums)[MINE][K][4], int first, float factor,
                       int warp, int lane) {
#pragma unroll
    for (int j = 0; j < MINE; ++j) {
        const int group = warp + j * WARPS;
        if (16 * group >= task.depth) continue;
#pragma unroll
        for (int n = 0; n < COUNT / 8; ++n)
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const int d = 16 * group + lane / 4 + c / 2 * 8, k = 8 * n + lane % 4 * 2 + c % 2;
                staged[k * (task.depth + 4) + d] = factor * sums[j][first / 8 + n][c];
            }
    }
}

// `from` at the same place of every block of the cluster, in the order of their ranks.
DEVICE float cluster_sum(const Task &task, const float *from) {
    float sum = 0;
    for (int rank = 0; rank < task.cluster; ++rank) sum += cluster_read(from, rank);
    return sum;
}

// ------------------------------------------------------------------------------------------------------- forward

template <typename Element, bool CHANNELS_LAST, int K, int T, int PARTS>
KERNEL(THREADS, 1) encode_tiles(const Task task) {
    using S = Shared<Element, CHANNELS_LAST, K, T, PARTS, false>;
    using P = Position<K, T>;
    const S shared(task);
    const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
    const int i = thread / P::LANES, among = thread % P::LANES;
    const int64_t clusters = int64_t(gridDim.x) / task.cluster, slot = int64_t(blockIdx.x) / task.cluster;
    begin_tiles(task, shared, Turns(task, slot));
    prepare(task, shared);  // while the tiles come
    for (int64_t item = slot; item < task.batch * task.parts; item += clusters) {
        float sums[MINE][K / 8][4] = {}, mass[P::EACH] = {};
        const Turns turns(task, item);
        if (item != slot) begin_tiles(task, shared, turns);
        each_tile(task, shared, turns, [&](const auto &tile, int64_t number) {
            multiply_tile(task, shared, tile, warp, lane);
            __syncthreads();
            float weights[P::EACH], cross[P::EACH], length;
            assign(shared, i, among, number * T + i < task.positions, weights, cross, length);
#pragma unroll
            for (int j = 0; j < P::EACH; ++j) {
                const int k = among + j * P::LANES;
                if (k >= K) continue;
                const Element rounded = narrow<Element>(weights[j]);
                *shared.weights.at(i, k) = rounded;
                mass[j] += widen(rounded);
            }
            __syncthreads();
            accumulate<Element, CHANNELS_LAST, false>(sums, tile, shared.weights, T / Fragments<Element>::DEPTH,
                                                      task.depth / 16, warp, lane);
        });
        add_positions<K, T>(mass, shared.products, shared.sums);
        const int size = task.codewords_count * task.channels;
        float *partial = task.result ? nullptr : task.partials + item * (size + task.codewords_count);
#pragma unroll
        for (int first = 0; first < K; first += S::SLICE) {
            if (first >= task.codewords_count) break;
            if (first) cluster_barrier();  // all have read the slice before
            stage_sums<S::SLICE>(task, shared.staged, sums, first, 1, warp, lane);
            cluster_barrier();
            const int begin = first * task.channels;
            const int end = int(least(begin + S::SLICE * task.channels, size));
            const int share = (end - begin + task.cluster - 1) / task.cluster, mine = begin + cluster_rank() * share;
            const int last = int(least(mine + share, end));
            for (int index = mine + thread; index < last; index += THREADS) {
                const int k = index / task.channels, d = index % task.channels;
                const float total = cluster_sum(task, shared.staged + (k - first) * (task.depth + 4) + d);
                if (partial)
                    partial[index] = total;
                else
                    task.result[item * size + index] =
                        task.factor * (total - cluster_sum(task, shared.sums + k) * task.codewords[index]);
            }
        }
        if (partial && cluster_rank() == 0 && thread < task.codewords_count)
            partial[size + thread] = cluster_sum(task, shared.sums + thread);
        cluster_barrier();
    }
}

// ------------------------------------------------------------------------------------------------------ backward

// With G = factor * grad and W, Q, P as in encoding_cpu.cpp. The pass is linear in G, which is divided by `unit`, a power
// of two about as large as G's largest number in this image, so that a half type holds G and W well.

constexpr int MOST_EXPONENT = 60;  // units of two images then differ by less than float32's range

// The exponent of the unit for this image's G; `before` where G is all zeros. Ends with a barrier; uses `scratch`.
DEVICE int exponent_of(const Task &task, const float *grad, float *scratch, int before) {
    const int thread = int(threadIdx.x);
    float top = 0;
    for (int index = thread; index < task.codewords_count * task.channels; index += THREADS)
        top = fmaxf(top, fabsf(task.factor * grad[index]));
    for (int distance = 16; distance; distance /= 2) top = fmaxf(top, shuffle(top, distance));
    __syncthreads();
    if (thread % 32 == 0) scratch[thread / 32] = top;
    __syncthreads();
    for (int w = 0; w < WARPS; ++w) top = fmaxf(top, scratch[w]);
    __syncthreads();
    if (!(top > 0)) return before;
    const int exponent = int(float_bits(top) >> 23) - 126;
    return exponent < -MOST_EXPONENT ? -MOST_EXPONENT : exponent > MOST_EXPONENT ? MOST_EXPONENT : exponent;
}

DEVICE float power_of_two(int exponent) {
    const int held = exponent < -126 ? -126 : exponent > 127 ? 127 : exponent;
    return bits_float(uint32_t(held + 127) << 23);
}

// float16 ends at 65504; a longer number would become infinite and spoil its neighbours. NaN stays NaN.
template <typename Element>
DEVICE Element narrow_finite(float value) {
    if constexpr (std::is_same_v<Element, Half>) value = fabsf(value) > 65504 ? copysignf(65504, value) : value;
    return narrow<Element>(value);
}

// x at positions t and t + 1 of channel d becomes its gradient.
template <typename TileOf>
DEVICE void finish_pair(const typename TileOf::Store &tile, int t, int d, float unit, const float *totals,
                        const float *gradient) {
    using Element = typename TileOf::Number;
    if constexpr (TileOf::PAIRS) {
        uint32_t *pair = reinterpret_cast<uint32_t *>(TileOf::at(tile, t, d));
        const float2 x = widen_pair<Element>(*pair);
        *pair = narrow_pair<Element>(unit * (gradient[0] + totals[0] * x.x), unit * (gradient[1] + totals[1] * x.y));
    } else {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            Element *x = TileOf::at(tile, t + c, d);
            *x = narrow<Element>(unit * (gradient[c] + totals[c] * widen(*x)));
        }
    }
}

template <typename Element, bool CHANNELS_LAST, int K, int T, int PARTS>
KERNEL(THREADS, 1) encode_backward_tiles(const Task task) {
    using S = Shared<Element, CHANNELS_LAST, K, T, PARTS, true>;
    using P = Position<K, T>;
    using TileOf = typename S::TileOf;
    const S shared(task);
    const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
    const int i = thread / P::LANES, among = thread % P::LANES;
    const int groups = task.depth / 16, size = task.codewords_count * task.channels;
    const int64_t clusters = int64_t(gridDim.x) / task.cluster, slot = int64_t(blockIdx.x) / task.cluster;
    begin_tiles(task, shared, Turns(task, slot));
    prepare(task, shared);  // while the tiles come
    float sums[MINE][K / 8][4] = {}, scale_sums[P::EACH] = {};  // both in units of 2^exponent
    int exponent = 0;
    for (int64_t item = slot; item < task.batch * task.parts; item += clusters) {
        const Turns turns(task, item);
        if (item != slot) begin_tiles(task, shared, turns);
        const float *grad = task.grad + turns.image * size;
        const int before = exponent;
        exponent = exponent_of(task, grad, shared.totals, before);
        const float rescale = power_of_two(before - exponent), unit = power_of_two(exponent);
        const float divided = task.factor * power_of_two(-exponent);
#pragma unroll
        for (int j = 0; j < MINE; ++j)
#pragma unroll
            for (int n = 0; n < K / 8; ++n)
#pragma unroll
                for (int c = 0; c < 4; ++c) sums[j][n][c] *= rescale;
#pragma unroll
        for (int j = 0; j < P::EACH; ++j) scale_sums[j] *= rescale;
        load_codes<Element, K>(task, shared.codes, K, grad, divided);
        __syncthreads();
        dot_rows<Element, K>(task, shared.codes, K, shared.cross, warp, lane);
        __syncthreads();

        float mass[P::EACH] = {}, minus_w_sums[P::EACH] = {};
        each_tile(task, shared, turns, [&](const auto &tile, int64_t number) {
            multiply_tile(task, shared, tile, warp, lane);
            __syncthreads();
            {
                float weights[P::EACH], cross[P::EACH], projections[P::EACH], length, mean = 0, total = 0;
                assign(shared, i, among, number * T + i < task.positions, weights, cross, length);
#pragma unroll
                for (int j = 0; j < P::EACH; ++j) {
                    const int k = among + j * P::LANES;
                    projections[j] = 0;
                    if (k >= K) continue;
#pragma unroll
                    for (int part = 0; part < PARTS; ++part)
                        projections[j] += shared.products[(part * T + i) * S::PRODUCTS_PITCH + K + k];
                    projections[j] -= shared.cross[k];
                    mean += weights[j] * projections[j];
                }
                mean = P::sum(mean);
#pragma unroll
                for (int j = 0; j < P::EACH; ++j) {
                    const int k = among + j * P::LANES;
                    if (k >= K) continue;
                    const float q = weights[j] * (projections[j] - mean);
                    const Element minus_w = narrow_finite<Element>(shared.slope[k] * q);
                    *shared.weights.at(i, k) = minus_w;
                    *shared.weights.at(i, K + k) = narrow<Element>(weights[j]);
                    scale_sums[j] += q * (length - 2 * cross[j] + shared.norms[k]);
                    mass[j] += weights[j];
                    minus_w_sums[j] += widen(minus_w);
                    total -= widen(minus_w);
                }
                total = P::sum(total);
                if (among == 0) shared.totals[i] = total;
            }
            __syncthreads();
            accumulate<Element, CHANNELS_LAST, false>(sums, tile, shared.weights, T / Fragments<Element>::DEPTH, groups,
                                                      warp, lane);
            // This warp's channels of the tile become their gradient; no other warp reads them any more, and none of its
            // own lanes does.
            __syncwarp();
            float gradient[MINE][T / 8][4] = {};
            accumulate<Element, true, true>(gradient, shared.codes, shared.weights, 2 * K / Fragments<Element>::DEPTH,
                                            groups, warp, lane);
#pragma unroll
            for (int j = 0; j < MINE; ++j) {
                const int group = warp + j * WARPS;
                if (group >= groups) continue;
#pragma unroll
                for (int n = 0; n < T / 8; ++n)
#pragma unroll
                    for (int c = 0; c < 4; c += 2) {
                        const int d = 16 * group + lane / 4 + c * 4, t = 8 * n + lane % 4 * 2;
                        finish_pair<TileOf>(tile, t, d, unit, shared.totals + t, &gradient[j][n][c]);
                    }
            }
            __syncthreads();
            TileOf::write(task, tile, turns.image, number);
        });

        // dc_k = -sum_i A_ik G_k - sum_i W_ik x_i + (sum_i W_ik) c_k, of which `sums` holds the second term.
        add_positions<K, T>(mass, shared.products, shared.sums);
        add_positions<K, T>(minus_w_sums, shared.products, shared.sums + K);
#pragma unroll
        for (int j = 0; j < MINE; ++j) {
            const int group = warp + j * WARPS;
#pragma unroll
            for (int n = 0; n < K / 8; ++n)
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    const int d = 16 * group + lane / 4 + c / 2 * 8, k = 8 * n + lane % 4 * 2 + c % 2;
                    if (d >= task.channels || k >= task.codewords_count) continue;
                    const int index = k * task.channels + d;
                    sums[j][n][c] -= shared.sums[k] * (divided * grad[index]);
                    sums[j][n][c] -= shared.sums[K + k] * task.codewords[index];
                }
        }
    }

    const float unit = power_of_two(exponent);
    add_positions<K, T>(scale_sums, shared.products, shared.sums);
    stage_sums<K>(task, shared.staged, sums, 0, unit, warp, lane);
    cluster_barrier();
    const int share = (size + task.cluster - 1) / task.cluster, first = cluster_rank() * share;
    const int last = int(least(first + share, size));
    float *partial = task.partials + slot * (size + task.codewords_count);
    float *to = task.result ? task.result : partial, *scale_to = task.result ? task.scale_result : partial + size;
    for (int index = first + thread; index < last; index += THREADS)
        to[index] = cluster_sum(task, shared.staged + index / task.channels * (task.depth + 4) + index % task.channels);
    if (cluster_rank() == 0 && thread < task.codewords_count)
        scale_to[thread] = unit * cluster_sum(task, shared.sums + thread);
    cluster_barrier();
}

}  // namespace
