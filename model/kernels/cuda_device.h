// Everything that only an NVIDIA device can do, each behind a small function: tensor cores, asynchronous copies, clusters,
// conversions, launches. The kernels' sources name nothing of the kind themselves, so that with ENCNET_EMULATION defined
// (tests/model/cuda_emulation.h) a C++ compiler turns the same sources into a program that runs without a GPU.
#pragma once

#include <stdint.h>

#ifdef ENCNET_EMULATION
#include "cuda_emulation.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <tuple>
#include <type_traits>

#define DEVICE __device__ __forceinline__
// `blocks`: of so many threads, that a multiprocessor is to have room for.
#define KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

// ------------------------------------------------------------------------------------------------------- numbers

using Half = __half;
using BFloat = __nv_bfloat16;

DEVICE float widen(float value) { return value; }
DEVICE float widen(Half value) { return __half2float(value); }
DEVICE float widen(BFloat value) { return __bfloat162float(value); }

template <typename Element>
DEVICE Element narrow(float value) {
    if constexpr (sizeof(Element) == 4)
        return value;
    else if constexpr (std::is_same_v<Element, Half>)
        return __float2half_rn(value);
    else
        return __float2bfloat16_rn(value);
}

// Two neighbours in memory, the first in the low half.
template <typename Element>
DEVICE float2 widen_pair(uint32_t pair) {
    if constexpr (std::is_same_v<Element, Half>)
        return __half22float2(*reinterpret_cast<__half2 *>(&pair));
    else
        return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

template <typename Element>
DEVICE uint32_t narrow_pair(float low, float high) {
    uint32_t bits;
    if constexpr (std::is_same_v<Element, Half>) {
        const __half2 pair = __floats2half2_rn(low, high);
        bits = *reinterpret_cast<const uint32_t *>(&pair);
    } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        bits = *reinterpret_cast<const uint32_t *>(&pair);
    }
    return bits;
}

DEVICE uint32_t float_bits(float value) { return __float_as_uint(value); }
DEVICE float bits_float(uint32_t bits) { return __uint_as_float(bits); }

// The value of lane `lane ^ distance` of this warp.
DEVICE float shuffle(float value, int distance) { return __shfl_xor_sync(0xffffffffu, value, distance); }

// ------------------------------------------------------------------------------------------------- shared memory

DEVICE unsigned char *shared_memory() {
    extern __shared__ __align__(128) unsigned char encnet_shared[];
    return encnet_shared;
}

DEVICE uint32_t shared_address(const void *pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

// Copy BYTES (4, 8 or 16) from global to shared memory without waiting; only the first `valid` are read, zeros follow.
template <int BYTES>
DEVICE void copy_async(void *to, const void *from, int valid) {
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(BYTES),
                     "r"(valid)
                     : "memory");
}

// Close the group of copies issued since the last call; wait until all but the newest PENDING groups are there.
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
DEVICE void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// 8x8 matrices of 16-bit elements, lane 8m + r giving the address of row r of matrix m. Lane 4g + t receives the elements
// (g, 2t) and (g, 2t + 1) of each; TRANSPOSED, (2t, g) and (2t + 1, g).
template <bool TRANSPOSED>
DEVICE void load_matrices(uint32_t (&to)[4], const void *row) {
    if constexpr (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(shared_address(row))
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                     : "r"(shared_address(row))
                     : "memory");
}

template <bool TRANSPOSED>
DEVICE void load_matrices(uint32_t (&to)[2], const void *row) {
    if constexpr (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                     : "=r"(to[0]), "=r"(to[1])
                     : "r"(shared_address(row))
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                     : "=r"(to[0]), "=r"(to[1])
                     : "r"(shared_address(row))
                     : "memory");
}

// -------------------------------------------------------------------------------------------------- tensor cores

// sums (16, 8) += left (16, 16) right (16, 8) of a 16-bit type; fragments as PTX's mma.m16n8k16 has them.
template <typename Element>
DEVICE void multiply_halves(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]) {
    if constexpr (std::is_same_v<Element, Half>)
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
    else
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}

// sums (16, 8) += left (16, 8) right (8, 8) of float32 bits that are tf32 numbers; fragments as mma.m16n8k8's.
DEVICE void multiply_tf32(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}

// ------------------------------------------------------------------------------------------------------- clusters

// Blocks that run at the same time and read one another's shared memory. In code compiled for less than compute_90 each is
// a cluster of its own, on whatever card it runs.
DEVICE int cluster_rank() {
#if __CUDA_ARCH__ >= 900
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return int(rank);
#else
    return 0;
#endif
}

DEVICE void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
    __syncthreads();
#endif
}

// `from`, which points into this block's shared memory, read at the same place of block `rank` of the cluster.
DEVICE float cluster_read(const float *from, int rank) {
#if __CUDA_ARCH__ >= 900
    uint32_t there;
    float value;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(from)), "r"(rank));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(there) : "memory");
    return value;
#else
    return *from;
#endif
}

// --------------------------------------------------------------------------------------------------------- host

struct Limits {
    int multiprocessors, shared_bytes, most_in_cluster;
};

struct Launch {
    int64_t blocks;
    int threads, cluster;
    int64_t shared_bytes;
};

// Makes `device` current as long as it lives. Error codes here are cudaError_t, 0 for none.
class OnDevice {
  public:
    explicit OnDevice(int device) {
        error = cudaGetDevice(&before_);
        if (!error && before_ != device) error = cudaSetDevice(device);
        device_ = device;
    }
    ~OnDevice() {
        if (before_ != device_) cudaSetDevice(before_);
    }
    OnDevice(const OnDevice &) = delete;
    OnDevice &operator=(const OnDevice &) = delete;

    int error;

  private:
    int before_ = 0, device_ = 0;
};

inline const char *error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

inline int read_limits(int device, Limits *limits) {
    int major = 0, failed = cudaDeviceGetAttribute(&limits->multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (!failed)
        failed = cudaDeviceGetAttribute(&limits->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (!failed) failed = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    limits->most_in_cluster = major >= 9 ? 8 : 1;
    return failed;
}

template <typename... Parameters>
int launch(void (*kernel)(Parameters...), const Launch &how, void *stream, Parameters... parameters) {
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = unsigned(how.cluster);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(how.blocks));
    config.blockDim = dim3(unsigned(how.threads));
    config.dynamicSmemBytes = size_t(how.shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &cluster;
    config.numAttrs = how.cluster > 1 ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, parameters...);
}

// How many clusters of `how` the current device, number `device`, holds at once; 0 where it cannot run even one, as where
// the driver made the kernel from older PTX than clusters. Also allows the kernel its shared memory. Asked once for each
// kernel and launch.
template <typename... Parameters>
int clusters_at_once(void (*kernel)(Parameters...), const Launch &how, int device, const Limits &limits, int *count) {
    static std::mutex mutex;
    static std::map<std::tuple<const void *, int, int, int64_t>, int> known;
    const void *function = reinterpret_cast<const void *>(kernel);
    const std::lock_guard<std::mutex> lock(mutex);
    const auto [place, fresh] = known.try_emplace({function, device, how.cluster, how.shared_bytes}, 0);
    if (!fresh) {
        *count = place->second;
        return 0;
    }
    int failed = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared_bytes);
    if (!failed && how.cluster > 1) {
        cudaFuncAttributes built{};
        failed = cudaFuncGetAttributes(&built, function);
        cudaLaunchAttribute cluster{};
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim.x = unsigned(how.cluster);
        cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(unsigned(how.cluster));
        config.blockDim = dim3(unsigned(how.threads));
        config.dynamicSmemBytes = size_t(how.shared_bytes);
        config.attrs = &cluster;
        config.numAttrs = 1;
        if (!failed && built.ptxVersion >= 90 && cudaOccupancyMaxActiveClusters(&place->second, function, &config)) {
            cudaGetLastError();
            place->second = 0;
        }
    } else if (!failed) {
        failed = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&place->second, function, how.threads,
                                                               size_t(how.shared_bytes));
        place->second *= limits.multiprocessors;
    }
    *count = place->second;
    if (failed) known.erase(place);
    return failed;
}

#endif
