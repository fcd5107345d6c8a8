// The Encoding op for any D and K, in float32 on the ordinary cores whatever x's type: the path for shapes that
// cuda_tiles.h leaves out. Everything is `block_product` over squares of 64, with operands fetched piece by piece; a
// tile's products and weights are kept in the workspace, (64, 3 K) for each block.
#pragma once

#include "cuda_tiles.h"

namespace {

constexpr int GENERAL_THREADS = 256, SIDE = 64, DEEP = 16;
constexpr int GENERAL_BLOCKS = 2;  // on a multiprocessor at once

struct GeneralTask {
    const void *x;
    void *grad_x;
    int64_t x_strides[3], grad_x_strides[3];  // of image, channel, position
    const float *codewords, *scale, *grad;
    float *partials;  // for each item (forward) or block (backward) K * D floats, then K more
    float *scratch;   // for each block: (SIDE, 3 K) weights, then 4 K numbers
    int64_t batch, positions, tiles, parts, channels, codewords_count;
    float factor;
};

__host__ __device__ inline int64_t scratch_floats(int64_t codewords_count) { return (3 * SIDE + 4) * codewords_count; }

// For row, column < SIDE: finish(row, column, sum_j left(j, row) right(j, column)), j < depth. `*_along` says that
// neighbours of the row (column) are neighbours in memory, rather than neighbours of j. If `norms` is given, it becomes
// (SIDE,): sum_j left(j, row)^2.
template <typename LeftOf, typename RightOf, typename Finish>
DEVICE void block_product(int64_t depth, bool left_along, LeftOf left, bool right_along, RightOf right, Finish finish,
                          float *norms = nullptr) {
    float(*lefts)[SIDE + 4] = reinterpret_cast<float(*)[SIDE + 4]>(shared_memory());
    float(*rights)[SIDE + 4] = lefts + DEEP;
    const int thread = int(threadIdx.x), row = thread / 16 * 4, column = thread % 16 * 4;
    float sums[4][4] = {}, norm = 0;
    for (int64_t start = 0; start < depth; start += DEEP) {
        __syncthreads();
        for (int index = thread; index < DEEP * SIDE; index += GENERAL_THREADS) {
            const int lj = left_along ? index / SIDE : index % DEEP, ll = left_along ? index % SIDE : index / DEEP;
            const int rj = right_along ? index / SIDE : index % DEEP, rl = right_along ? index % SIDE : index / DEEP;
            lefts[lj][ll] = start + lj < depth ? left(start + lj, ll) : 0;
            rights[rj][rl] = start + rj < depth ? right(start + rj, rl) : 0;
        }
        __syncthreads();
        float some[4][4] = {}, some_norm = 0;  // sums of sums: long ones would lose digits
#pragma unroll
        for (int j = 0; j < DEEP; ++j) {
            if (norms && thread < SIDE) some_norm += lefts[j][thread] * lefts[j][thread];
            float four[4];
#pragma unroll
            for (int c = 0; c < 4; ++c) four[c] = rights[j][column + c];
#pragma unroll
            for (int r = 0; r < 4; ++r)
#pragma unroll
                for (int c = 0; c < 4; ++c) some[r][c] += lefts[j][row + r] * four[c];
        }
        norm += some_norm;
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
            for (int c = 0; c < 4; ++c) sums[r][c] += some[r][c];
    }
    if (norms && thread < SIDE) norms[thread] = norm;
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int c = 0; c < 4; ++c) finish(row + r, column + c, sums[r][c]);
    __syncthreads();
}

DEVICE float warp_sum(float value) {
    for (int distance = 16; distance; distance /= 2) value += shuffle(value, distance);
    return value;
}

DEVICE float warp_largest(float value) {
    for (int distance = 16; distance; distance /= 2) value = fmaxf(value, shuffle(value, distance));
    return value;
}

template <typename Element, bool BACKWARD>
KERNEL(GENERAL_THREADS, GENERAL_BLOCKS) encode_general(const GeneralTask task) {
    const int64_t K = task.codewords_count, D = task.channels, size = K * D, width = 3 * K;
    const int thread = int(threadIdx.x), warp = thread / 32, lane = thread % 32;
    float *norms = reinterpret_cast<float *>(shared_memory()) + 2 * DEEP * (SIDE + 4), *totals = norms + SIDE;
    float *rows = task.scratch + int64_t(blockIdx.x) * scratch_floats(K);  // (SIDE, 3 K)
    float *weight_sums = rows + SIDE * width, *minus_w_sums = weight_sums + K;
    float *code_norms = minus_w_sums + K, *code_products = code_norms + K;  // c_k.c_k and c_k.G_k
    const Element *x = static_cast<const Element *>(task.x);
    Element *grad_x = static_cast<Element *>(task.grad_x);
    const bool along = task.x_strides[2] == 1;
    float *partial = task.partials + int64_t(blockIdx.x) * (size + K);  // dc and dscale

    float reference = -INFINITY;
    for (int64_t k = lane; k < K; k += 32) reference = fmaxf(reference, task.scale[k]);
    reference = warp_largest(reference);
    if (BACKWARD)
        for (int64_t index = thread; index < size + K; index += GENERAL_THREADS) partial[index] = 0;
    for (int64_t item = int64_t(blockIdx.x); item < task.batch * task.parts; item += gridDim.x) {
        const int64_t image = item / task.parts;
        const float *grad = BACKWARD ? task.grad + image * size : nullptr;
        if (!BACKWARD) {
            partial = task.partials + item * (size + K);  // sum_i A_ik x_i and sum_i A_ik
            for (int64_t index = thread; index < size + K; index += GENERAL_THREADS) partial[index] = 0;
        }
        for (int64_t k = thread; k < 2 * K; k += GENERAL_THREADS) weight_sums[k] = 0;
        for (int64_t k = warp; k < K; k += GENERAL_THREADS / 32) {
            float norm = 0, product = 0;
            for (int64_t d = lane; d < D; d += 32) {
                const float c = task.codewords[k * D + d];
                norm += c * c;
                if (BACKWARD) product += c * (task.factor * grad[k * D + d]);
            }
            norm = warp_sum(norm), product = warp_sum(product);
            if (lane == 0) code_norms[k] = norm, code_products[k] = product;
        }
        for (int64_t tile = item % task.parts; tile < task.tiles; tile += task.parts) {
            const int64_t first = tile * SIDE, count = least(SIDE, task.positions - first);
            const Element *start = x + image * task.x_strides[0] + first * task.x_strides[2];
            const auto x_at = [&](int64_t d, int64_t i) {
                return i < count && d < D ? widen(start[d * task.x_strides[1] + i * task.x_strides[2]]) : 0.0f;
            };

            // rows: x.c, and x.G below it.
            for (int64_t k = 0; k < (BACKWARD ? 2 * K : K); k += SIDE)
                block_product(
                    D, along, x_at, false,
                    [&](int64_t d, int64_t l) {
                        const int64_t row = k + l;
                        return row < K ? task.codewords[row * D + d]
                                       : BACKWARD && row < 2 * K ? task.factor * grad[(row - K) * D + d] : 0.0f;
                    },
                    [&](int i, int l, float sum) {
                        if (k + l < (BACKWARD ? 2 * K : K)) rows[i * width + k + l] = sum;
                    },
                    k == 0 ? norms : nullptr);

            // One warp for each position: rows become A; in the backward pass -W, A and the terms of dscale.
            for (int i = warp; i < SIDE; i += GENERAL_THREADS / 32) {
                float *row = rows + i * width, *terms = row + 2 * K, *weights = BACKWARD ? row + K : row;
                float top = -INFINITY, total = 0, mean = 0, w = 0;
                for (int64_t k = lane; k < K; k += 32) {
                    const float scale = task.scale[k], cross = row[k];
                    const float logit = (scale - reference) * norms[i] + scale * (code_norms[k] - 2 * cross);
                    terms[k] = norms[i] - 2 * cross + code_norms[k];
                    if (BACKWARD) row[k] = row[K + k] - code_products[k];
                    weights[k] = logit;
                    top = fmaxf(top, logit);
                }
                top = warp_largest(top);
                for (int64_t k = lane; k < K; k += 32) total += weights[k] = expf(weights[k] - top);
                total = warp_sum(total);
                for (int64_t k = lane; k < K; k += 32) {
                    weights[k] = i < count ? weights[k] / total : 0;
                    if (BACKWARD) mean += weights[k] * row[k];
                }
                if (!BACKWARD) continue;
                mean = warp_sum(mean);
                for (int64_t k = lane; k < K; k += 32) {
                    const float q = i < count ? weights[k] * (row[k] - mean) : 0;
                    terms[k] *= q;
                    row[k] = -2 * task.scale[k] * q;
                    w -= row[k];
                }
                w = warp_sum(w);
                if (lane == 0) totals[i] = w;
            }
            __syncthreads();
            for (int64_t k = thread; k < K; k += GENERAL_THREADS)
                for (int64_t i = 0; i < SIDE; ++i) {
                    weight_sums[k] += rows[i * width + (BACKWARD ? K : 0) + k];
                    if (BACKWARD) {
                        minus_w_sums[k] += rows[i * width + k];
                        partial[size + k] += i < count ? rows[i * width + 2 * K + k] : 0;
                    }
                }

            // sum_i A_ik x_i, or -sum_i W_ik x_i.
            for (int64_t k = 0; k < K; k += SIDE)
                for (int64_t d = 0; d < D; d += SIDE)
                    block_product(
                        SIDE, true, [&](int64_t i, int64_t l) { return k + l < K ? rows[i * width + k + l] : 0.0f; },
                        !along, [&](int64_t i, int64_t l) { return x_at(d + l, i); },
                        [&](int r, int c, float sum) {
                            if (k + r < K && d + c < D) partial[(k + r) * D + d + c] += sum;
                        });

            // dx_i = sum_k A_ik G_k - sum_k W_ik c_k + (sum_k W_ik) x_i.
            for (int64_t d = 0; BACKWARD && d < D; d += SIDE)
                block_product(
                    2 * K, true,
                    [&](int64_t k, int64_t l) {
                        const int64_t row = d + l;
                        if (row >= D) return 0.0f;
                        return k < K ? task.codewords[k * D + row] : task.factor * grad[(k - K) * D + row];
                    },
                    false, [&](int64_t k, int64_t l) { return rows[l * width + k]; },
                    [&](int r, int c, float sum) {
                        if (d + r >= D || c >= count) return;
                        const int64_t *strides = task.grad_x_strides;
                        grad_x[image * strides[0] + (d + r) * strides[1] + (first + c) * strides[2]] =
                            narrow<Element>(sum + totals[c] * x_at(d + r, c));
                    });
        }
        __syncthreads();
        if (BACKWARD)
            for (int64_t index = thread; index < size; index += GENERAL_THREADS) {
                const int64_t k = index / D;
                partial[index] -= weight_sums[k] * (task.factor * grad[index]);
                partial[index] -= minus_w_sums[k] * task.codewords[index];
            }
        else
            for (int64_t k = thread; k < K; k += GENERAL_THREADS) partial[size + k] = weight_sums[k];
        __syncthreads();
    }
}

// encoded (B, K, D) from `parts` partial sums of each image, in their order.
KERNEL(GENERAL_THREADS, 1)
add_forward(const float *partials, const float *codewords, float *encoded, int64_t batch, int64_t codewords_count,
            int64_t channels, int64_t parts, float factor) {
    const int64_t size = codewords_count * channels;
    for (int64_t index = int64_t(blockIdx.x) * GENERAL_THREADS + threadIdx.x; index < batch * size;
         index += int64_t(gridDim.x) * GENERAL_THREADS) {
        const int64_t within = index % size;
        const float *partial = partials + index / size * parts * (size + codewords_count);
        float total = 0, mass = 0;
        for (int64_t part = 0; part < parts; ++part, partial += size + codewords_count) {
            total += partial[within];
            mass += partial[size + within / channels];
        }
        encoded[index] = factor * (total - mass * codewords[within]);
    }
}

// Gradients of codewords and scale from `count` partial sums, in their order.
KERNEL(GENERAL_THREADS, 1)
add_backward(const float *partials, float *grad_codewords, float *grad_scale, int64_t codewords_count, int64_t channels,
             int64_t count) {
    const int64_t size = codewords_count * channels, all = size + codewords_count;
    for (int64_t index = int64_t(blockIdx.x) * GENERAL_THREADS + threadIdx.x; index < all;
         index += int64_t(gridDim.x) * GENERAL_THREADS) {
        float total = 0;
        for (int64_t from = 0; from < count; ++from) total += partials[from * all + index];
        *(index < size ? grad_codewords + index : grad_scale + index - size) = total;
    }
}

}  // namespace
