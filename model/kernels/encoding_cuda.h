/* The Encoding op on a CUDA device: encoding.h's interface with device pointers, queued on a stream.
 *
 * The calls only queue work: they never wait, never allocate, and may be captured into a CUDA graph. Half precision x is
 * multiplied on tensor cores, with codewords, gradient and weights rounded to x's type once and every sum, norm and
 * softmax in float32. float32 x is split into two tf32 parts, which keeps float32's accuracy. Results are the same bits
 * on every run on one kind of card. Positions, channels and codewords of any number; D <= 512 with K <= 64 is fast as far
 * as shared memory allows.
 */
#ifndef ENCNET_ENCODING_CUDA_H
#define ENCNET_ENCODING_CUDA_H

#include "encoding.h"

#ifdef __cplusplus
extern "C" {
#endif

enum encnet_cuda_status { ENCNET_CUDA_ERROR = 100 }; /* plus a cudaError_t */

typedef struct {
    int32_t device;  /* its number, as cudaSetDevice counts */
    void *stream;    /* a cudaStream_t of that device */
    void *workspace; /* device memory, at least as much as asked for, 16-byte aligned; used until the work is done */
} encnet_cuda;

/* Bytes of workspace that a call with these arguments needs; `backward` is 0 or 1. */
ENCNET_API int encnet_cuda_workspace(const encnet_sizes *sizes, const encnet_features *x, int32_t device,
                                     int32_t backward, int64_t *bytes);

/* As encnet_encode_cpu and encnet_encode_backward_cpu; the latter wants a batch of one or more. */
ENCNET_API int encnet_encode_cuda(const encnet_sizes *sizes, const encnet_features *x, const float *codewords,
                                  const float *scale, float *encoded, const encnet_cuda *cuda);
ENCNET_API int encnet_encode_backward_cuda(const encnet_sizes *sizes, const encnet_features *x, const float *codewords,
                                           const float *scale, const float *grad, const encnet_features *grad_x,
                                           float *grad_codewords, float *grad_scale, const encnet_cuda *cuda);

/* How a call with these arguments would run: "tiles T=64 stages=2 cluster=8 parts=1 ..." or "general ...". The text
 * stands until the same thread asks again. */
ENCNET_API const char *encnet_cuda_describe(const encnet_sizes *sizes, const encnet_features *x, int32_t device,
                                            int32_t backward);

ENCNET_API int encnet_cuda_interface(void); /* ENCNET_INTERFACE */

/* The text of a status of 100 and more, as the CUDA runtime words it. */
ENCNET_API const char *encnet_cuda_error(int status);

#ifdef __cplusplus
}
#endif
#endif
