// The CPU kernel under AddressSanitizer and UBSan, without Python: every buffer is its own allocation of exactly the size
// that the interface promises to touch, and every result is compared with sums written out in double.

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include <random>
#include <vector>

#include "encoding.h"

namespace {

std::mt19937 generator(0);

std::vector<float> numbers(size_t count, float spread) {
    std::normal_distribution<float> normal(0, spread);
    std::vector<float> values(count);
    for (float &value : values) value = normal(generator);
    return values;
}

// Hosts may run tasks in any order.
void backwards(void *, size_t count, encnet_task task, void *work) {
    while (count) task(work, --count);
}

struct Case {
    int64_t batch, channels, positions, codewords;
    bool channels_last;
    int32_t dtype;
};

struct Expected {
    std::vector<double> encoded, grad_x, grad_codewords, grad_scale;
};

Expected reference(const Case &c, const std::vector<float> &x, const std::vector<float> &codewords,
                   const std::vector<float> &scale, const std::vector<float> &grad, double factor) {
    const int64_t D = c.channels, N = c.positions, K = c.codewords;
    Expected want{std::vector<double>(size_t(c.batch * K * D)), std::vector<double>(x.size()),
                  std::vector<double>(codewords.size()), std::vector<double>(scale.size())};
    std::vector<double> distance(static_cast<size_t>(K)), weight(distance), logit_grad(distance);
    for (int64_t b = 0; b < c.batch; ++b)
        for (int64_t i = 0; i < N; ++i) {
            const auto at = [&](int64_t d) {
                return size_t(b * D * N + (c.channels_last ? i * D + d : d * N + i));
            };
            double top = -INFINITY, total = 0, mean = 0;
            for (int64_t k = 0; k < K; ++k) {
                distance[size_t(k)] = 0;
                for (int64_t d = 0; d < D; ++d)
                    distance[size_t(k)] += pow(double(x[at(d)]) - codewords[size_t(k * D + d)], 2);
                top = fmax(top, scale[size_t(k)] * distance[size_t(k)]);
            }
            for (size_t k = 0; k < size_t(K); ++k) total += weight[k] = exp(scale[k] * distance[k] - top);
            for (size_t k = 0; k < size_t(K); ++k) {
                weight[k] /= total;
                logit_grad[k] = 0;
                for (int64_t d = 0; d < D; ++d) {
                    const size_t kd = k * size_t(D) + size_t(d);
                    const double residual = double(x[at(d)]) - codewords[kd];
                    const double g = factor * grad[size_t(b * K * D) + kd];
                    want.encoded[size_t(b * K * D) + kd] += factor * weight[k] * residual;
                    logit_grad[k] += g * residual;
                }
                mean += weight[k] * logit_grad[k];
            }
            for (size_t k = 0; k < size_t(K); ++k) {
                const double q = weight[k] * (logit_grad[k] - mean);
                want.grad_scale[k] += q * distance[k];
                for (int64_t d = 0; d < D; ++d) {
                    const size_t kd = k * size_t(D) + size_t(d);
                    const double step = weight[k] * factor * grad[size_t(b * K * D) + kd] +
                                        2 * scale[k] * q * (double(x[at(d)]) - codewords[kd]);
                    want.grad_x[at(d)] += step;
                    want.grad_codewords[kd] -= step;
                }
            }
        }
    return want;
}

// The largest error, relative to the largest value.
template <typename Got>
double error(const Got &got, const std::vector<double> &want) {
    double worst = 0, size = 1e-3;
    for (size_t i = 0; i < want.size(); ++i) {
        worst = fmax(worst, fabs(got[i] - want[i]));
        size = fmax(size, fabs(want[i]));
    }
    return worst / size;
}

// bfloat16 by dropping bits, so that the values are exact in float32; float16 is exercised with small integers.
uint16_t narrow(float &value, int32_t dtype) {
    uint32_t bits;
    if (dtype == ENCNET_FLOAT16) {
        value = float(int(value) % 4);
        const uint16_t codes[] = {0, 0x3c00, 0x4000, 0x4200};
        return uint16_t(codes[abs(int(value))] | (value < 0 ? 0x8000 : 0));
    }
    __builtin_memcpy(&bits, &value, 4);
    bits &= 0xffff0000;
    __builtin_memcpy(&value, &bits, 4);
    return uint16_t(bits >> 16);
}

double run(const Case &c) {
    const int64_t D = c.channels, N = c.positions, K = c.codewords;
    const size_t elements = size_t(c.batch * D * N), encoded_elements = size_t(c.batch * K * D);
    std::vector<float> x = numbers(elements, c.dtype == ENCNET_FLOAT16 ? 2 : 1), codewords = numbers(size_t(K * D), 0.3f);
    std::vector<float> scale = numbers(size_t(K), 0.05f), grad = numbers(encoded_elements, 1);
    std::vector<uint16_t> half(elements), half_grad(elements);
    if (c.dtype != ENCNET_FLOAT32)
        for (size_t i = 0; i < elements; ++i) half[i] = narrow(x[i], c.dtype);

    std::vector<float> encoded(encoded_elements), grad_x(elements), grad_codewords(codewords), grad_scale(scale);
    const bool wide = c.dtype == ENCNET_FLOAT32;
    const int64_t channel = c.channels_last ? 1 : N, position = c.channels_last ? D : 1;
    const encnet_sizes sizes{c.batch, D, N, K, 0.5f};
    const encnet_features in{wide ? static_cast<void *>(x.data()) : half.data(), D * N, channel, position, c.dtype};
    const encnet_features out{wide ? static_cast<void *>(grad_x.data()) : half_grad.data(), D * N, channel, position,
                              c.dtype};
    const encnet_threads threads{backwards, nullptr};
    if (encnet_encode_cpu(&sizes, &in, codewords.data(), scale.data(), encoded.data(), &threads)) return INFINITY;
    if (encnet_encode_backward_cpu(&sizes, &in, codewords.data(), scale.data(), grad.data(), &out,
                                   grad_codewords.data(), grad_scale.data(), &threads))
        return INFINITY;

    const Expected want = reference(c, x, codewords, scale, grad, 0.5);
    double worst = fmax(error(encoded, want.encoded), error(grad_codewords, want.grad_codewords));
    worst = fmax(worst, error(grad_scale, want.grad_scale));
    return wide ? fmax(worst, error(grad_x, want.grad_x)) : worst;
}

}  // namespace

int main() {
    const int64_t shapes[][4] = {{1, 1, 1, 1},     {2, 3, 7, 2},    {1, 40, 64, 33}, {3, 17, 65, 16}, {0, 8, 9, 4},
                                 {1, 8, 0, 4},     {1, 5, 1100, 9}, {20, 6, 3, 32},  {2, 130, 63, 64}};
    double worst = 0;
    for (const char *name : {"baseline", "avx2", "avx512"}) {
        if (encnet_cpu_choose(name)) continue;
        for (const auto &[batch, channels, positions, codewords] : shapes)
            for (const bool channels_last : {false, true})
                for (const int32_t dtype : {ENCNET_FLOAT32, ENCNET_FLOAT16, ENCNET_BFLOAT16})
                    worst = fmax(worst, run({batch, channels, positions, codewords, channels_last, dtype}));
        printf("%s %.1e\n", name, worst);
    }
    return !(worst < 1e-4);
}
