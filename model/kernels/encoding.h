/* The Encoding op over raw pointers: the C interface that every host calls.
 *
 * Mathematics (Zhang et al., CVPR 2018, equation 1; model/encoding.py has the twin), for each image b:
 *     d_ik = ||x_i - c_k||^2,  A_i = softmax_k(scale_k d_ik),  E_k = factor * sum_i A_ik (x_i - c_k).
 * Arithmetic is float32 whatever the type of x. Results do not depend on the number of threads.
 */
#ifndef ENCNET_ENCODING_H
#define ENCNET_ENCODING_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define ENCNET_API __attribute__((visibility("default")))
#else
#define ENCNET_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define ENCNET_INTERFACE 1 /* counts changes of this file; a host refuses a library of another number */

enum encnet_dtype { ENCNET_FLOAT32 = 0, ENCNET_FLOAT16 = 1, ENCNET_BFLOAT16 = 2 };

enum encnet_status {
    ENCNET_OK = 0,
    ENCNET_BAD_SIZES = 1,   /* a size below its minimum */
    ENCNET_BAD_DTYPE = 2,   /* not one of encnet_dtype */
    ENCNET_BAD_STRIDES = 3, /* neither positions nor channels are next to each other in memory */
    ENCNET_NO_MEMORY = 4,
};

typedef struct {
    int64_t batch;     /* B >= 0 */
    int64_t channels;  /* D >= 1 */
    int64_t positions; /* N >= 0, height times width */
    int64_t codewords; /* K >= 1 */
    float factor;      /* reference_positions / N, or 1 */
} encnet_sizes;

/* x or its gradient, (B, D, N), read or written in place. Strides count elements; position_stride is 1 for contiguous
 * (B, D, H, W) memory, channel_stride is 1 for channels_last. */
typedef struct {
    void *data;
    int64_t batch_stride, channel_stride, position_stride;
    int32_t dtype;
} encnet_features;

/* How the host runs `count` independent tasks, on its own threads and in any order. NULL: one after another. */
typedef void (*encnet_task)(void *work, size_t index);
typedef struct {
    void (*run)(void *pool, size_t count, encnet_task task, void *work);
    void *pool;
} encnet_threads;

/* encoded (B, K, D). Codewords (K, D), scale (K,) and every result are contiguous float32. Returns encnet_status. */
ENCNET_API int encnet_encode_cpu(const encnet_sizes *sizes, const encnet_features *x, const float *codewords,
                                 const float *scale, float *encoded, const encnet_threads *threads);

/* Gradients of x, codewords (K, D) and scale (K,), given `grad` (B, K, D), that of `encoded`. The assignment weights
 * are computed anew, so the forward pass keeps nothing. */
ENCNET_API int encnet_encode_backward_cpu(const encnet_sizes *sizes, const encnet_features *x, const float *codewords,
                                          const float *scale, const float *grad, const encnet_features *grad_x,
                                          float *grad_codewords, float *grad_scale, const encnet_threads *threads);

/* The instruction set in use: "avx512", "avx2" or "baseline"; the widest that this processor has, unless chosen. */
ENCNET_API const char *encnet_cpu_instructions(void);

/* Choose one by its name, for tests and measurements; 0, or -1 where processor or build lack it. Not thread-safe. */
ENCNET_API int encnet_cpu_choose(const char *name);

ENCNET_API int encnet_interface(void);

#ifdef __cplusplus
}
#endif
#endif
