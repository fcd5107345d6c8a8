// Stands in for model/kernels/cuda_device.h's device half, so that the CUDA kernels run on a CPU, one thread at a time:
// every CUDA thread is a fiber. It is stricter than a card where a card may hide a fault. Shared memory begins as NaN, an
// asynchronous copy arrives only when it is waited for, tensor cores cut off where they add, unaligned vectors abort, and
// warps can be run in two orders: without a barrier where one is needed, results differ between them.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <type_traits>
#include <vector>

#define DEVICE inline
#define KERNEL(threads, blocks) void
#define __host__
#define __device__

struct float2 {
    float x, y;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

// ------------------------------------------------------------------------------------------------------- numbers

inline uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}
inline float bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

struct Half {
    uint16_t bits;
};
struct BFloat {
    uint16_t bits;
};

inline float widen(float value) { return value; }
inline float widen(BFloat value) { return bits_float(uint32_t(value.bits) << 16); }
inline float widen(Half value) {
    const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
    const float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                       : exponent == 0 ? ldexpf(float(fraction), -24)
                                       : ldexpf(float(fraction + 1024), exponent - 25);
    return value.bits & 0x8000 ? -size : size;
}

template <typename Element>
Element narrow(float value) {
    const uint32_t bits = float_bits(value), size = bits & 0x7fffffff;
    if constexpr (sizeof(Element) == 4) {
        return value;
    } else if constexpr (std::is_same_v<Element, BFloat>) {
        return {uint16_t(size > 0x7f800000 ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
    } else {
        const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
        if (size > 0x7f800000) return {uint16_t(sign | 0x7e00)};
        if (size >= 0x477ff000) return {uint16_t(sign | 0x7c00)};
        if (size < 0x38800000) return {uint16_t(sign | uint16_t(nearbyintf(ldexpf(bits_float(size), 24))))};
        return {uint16_t(sign | (size + 0xfff + (size >> 13 & 1) - 0x38000000) >> 13)};
    }
}

template <typename Element>
float2 widen_pair(uint32_t pair) {
    return {widen(Element{uint16_t(pair)}), widen(Element{uint16_t(pair >> 16)})};
}
template <typename Element>
uint32_t narrow_pair(float low, float high) {
    return narrow<Element>(low).bits | uint32_t(narrow<Element>(high).bits) << 16;
}

// -------------------------------------------------------------------------------------------------------- fibers

struct Index {
    unsigned x;
};
inline Index threadIdx, blockIdx, gridDim;

namespace emulation {

struct Limits {
    int multiprocessors = 4, shared_bytes = 232448, most_in_cluster = 4;
};
inline Limits limits;
inline bool descending = false;

enum State { READY, WAITING, DONE };
struct Copy {
    void *to;
    const void *from;
    int bytes, valid;
};
struct Warp {
    int arrived = 0;
    void *arguments[32] = {};
    const void *operation = nullptr;
};
struct Block {
    unsigned index = 0;
    int rank = 0, arrived = 0;
    unsigned char *shared = nullptr;
    std::vector<Warp> warps;
};
struct Fiber {
    ucontext_t context;
    jmp_buf here;
    bool begun;
    std::vector<char> stack;
    State state;
    unsigned thread;
    Block *block;
    std::vector<std::vector<Copy>> copies;
};

inline jmp_buf scheduler;
inline Fiber *current;
inline std::vector<Fiber> fibers;
inline std::vector<Block> blocks;
inline int threads, cluster_arrived;
inline const std::function<void()> *body;

[[noreturn]] inline void fault(const char *what) {
    fprintf(stderr, "CUDA emulation: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
    abort();
}

// A fiber begins with setcontext; later switches are _longjmp, which spares the system calls.
inline void leave(State state) {
    current->state = state;
    if (!_setjmp(current->here)) _longjmp(scheduler, 1);
}

inline void enter(Fiber &fiber) {
    if (_setjmp(scheduler)) return;
    if (fiber.begun) _longjmp(fiber.here, 1);
    fiber.begun = true;
    setcontext(&fiber.context);
}

inline void wait() { leave(WAITING); }

inline void run_fiber() {
    (*body)();
    leave(DONE);
}

inline Fiber &fiber_of(const Block &block, unsigned thread) {
    return fibers[size_t(&block - blocks.data()) * unsigned(threads) + thread];
}

// All 32 lanes of a warp meet here; the last one does `operation` for all of them.
template <typename Arguments>
void together(Arguments &mine, void (*operation)(Arguments *(&)[32])) {
    Block &block = *current->block;
    const unsigned thread = current->thread;
    Warp &warp = block.warps[thread / 32];
    if (warp.arrived && warp.operation != reinterpret_cast<void *>(operation)) fault("lanes of a warp do different things");
    warp.operation = reinterpret_cast<void *>(operation);
    warp.arguments[thread % 32] = &mine;
    if (++warp.arrived < 32) return wait();
    Arguments *every[32];
    for (int lane = 0; lane < 32; ++lane) every[lane] = static_cast<Arguments *>(warp.arguments[lane]);
    operation(every);
    warp.arrived = 0;
    for (unsigned lane = 0; lane < 32; ++lane) fiber_of(block, thread / 32 * 32 + lane).state = READY;
}

// Run one cluster to its end: each warp as far as it comes, then the next.
inline void run_cluster(unsigned first, int cluster, int block_threads, int64_t shared_bytes) {
    threads = block_threads;
    cluster_arrived = 0;
    blocks.assign(size_t(cluster), Block());
    if (fibers.size() < size_t(cluster * threads)) fibers.resize(size_t(cluster * threads));
    std::vector<std::vector<unsigned char>> memory;
    for (int rank = 0; rank < cluster; ++rank) {
        memory.emplace_back(size_t(shared_bytes) + 128, uint8_t(0xff));
        Block &block = blocks[size_t(rank)];
        block.index = first + unsigned(rank);
        block.rank = rank;
        block.shared = memory.back().data() + (128 - reinterpret_cast<uintptr_t>(memory.back().data()) % 128) % 128;
        block.warps.resize(size_t(threads / 32));
        for (int thread = 0; thread < threads; ++thread) {
            Fiber &fiber = fiber_of(block, unsigned(thread));
            fiber.thread = unsigned(thread);
            fiber.block = &block;
            fiber.state = READY;
            fiber.begun = false;
            fiber.copies.assign(1, {});
            fiber.stack.resize(1 << 16);
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.data();
            fiber.context.uc_stack.ss_size = fiber.stack.size();
            makecontext(&fiber.context, run_fiber, 0);
        }
    }
    const int warps = cluster * threads / 32;
    for (bool moved = true; moved;) {
        moved = false;
        for (int turn = 0; turn < warps; ++turn) {
            const int warp = descending ? warps - 1 - turn : turn;
            for (bool ready = true; ready;) {
                ready = false;
                for (int lane = 0; lane < 32; ++lane) {
                    Fiber &fiber = fibers[size_t(32 * warp + (descending ? 31 - lane : lane))];
                    if (fiber.state != READY) continue;
                    ready = moved = true;
                    current = &fiber;
                    threadIdx.x = fiber.thread;
                    blockIdx.x = fiber.block->index;
                    enter(fiber);
                }
            }
        }
    }
    for (int i = 0; i < cluster * threads; ++i)
        if (fibers[size_t(i)].state != DONE) fault("threads wait for one another for ever");
}

inline float cut_off(double value) {
    const float nearest = float(value);
    return fabs(double(nearest)) > fabs(value) && isfinite(value) ? nextafterf(nearest, 0) : nearest;
}

struct Product {
    float *sums;
    const uint32_t *left, *right;
};

// Fragments as PTX lays them out: lane 4 g + t has rows g and g + 8 of the left matrix and column g of the right one.
template <int DEPTH, float (*NUMBER)(const uint32_t *registers, int index)>
void multiply(Product *(&lanes)[32]) {
    constexpr int PACKED = DEPTH / 8;  // numbers in a register
    float left[16][DEPTH], right[DEPTH][8];
    for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4 * PACKED; ++i) {
            const int g = lane / 4, t = lane % 4, reg = i / PACKED, depth = PACKED * t + i % PACKED;
            left[g + reg % 2 * 8][depth + reg / 2 * DEPTH / 2] = NUMBER(lanes[lane]->left, i);
            if (reg < 2) right[depth + reg * DEPTH / 2][g] = NUMBER(lanes[lane]->right, i);
        }
    for (int lane = 0; lane < 32; ++lane)
        for (int c = 0; c < 4; ++c) {
            const int row = lane / 4 + c / 2 * 8, column = lane % 4 * 2 + c % 2;
            double sum = lanes[lane]->sums[c];
            for (int d = 0; d < DEPTH; ++d) sum += double(left[row][d]) * right[d][column];
            lanes[lane]->sums[c] = cut_off(sum);
        }
}

template <typename Element>
float half_number(const uint32_t *registers, int index) {
    return widen(Element{uint16_t(registers[index / 2] >> index % 2 * 16)});
}
inline float tf32_number(const uint32_t *registers, int index) { return bits_float(registers[index] & 0xffffe000u); }

struct Matrices {
    uint32_t *to;
    const uint16_t *row;
};

template <int COUNT, bool TRANSPOSED>
void load(Matrices *(&lanes)[32]) {
    for (int lane = 0; lane < 32; ++lane)
        for (int m = 0; m < COUNT; ++m) {
            const int g = lane / 4, t = lane % 4;
            const uint16_t low = TRANSPOSED ? lanes[8 * m + 2 * t]->row[g] : lanes[8 * m + g]->row[2 * t];
            const uint16_t high = TRANSPOSED ? lanes[8 * m + 2 * t + 1]->row[g] : lanes[8 * m + g]->row[2 * t + 1];
            lanes[lane]->to[m] = low | uint32_t(high) << 16;
        }
}

struct Shuffle {
    float value, result;
    int distance;
};

}  // namespace emulation

// ------------------------------------------------------------------------------------------ what the kernels call

inline void __syncthreads() {
    using namespace emulation;
    Block &block = *current->block;
    if (++block.arrived < threads) return wait();
    block.arrived = 0;
    for (int thread = 0; thread < threads; ++thread) fiber_of(block, unsigned(thread)).state = READY;
}

inline void __syncwarp() {
    int nothing = 0;
    emulation::together<int>(nothing, [](int *(&)[32]) {});
}

inline float shuffle(float value, int distance) {
    emulation::Shuffle mine{value, 0, distance};
    emulation::together<emulation::Shuffle>(mine, [](emulation::Shuffle *(&lanes)[32]) {
        for (int lane = 0; lane < 32; ++lane) lanes[lane]->result = lanes[lane ^ lanes[lane]->distance]->value;
    });
    return mine.result;
}

inline unsigned char *shared_memory() { return emulation::current->block->shared; }

template <int BYTES>
void copy_async(void *to, const void *from, int valid) {
    if (reinterpret_cast<uintptr_t>(to) % BYTES || reinterpret_cast<uintptr_t>(from) % BYTES)
        emulation::fault("an unaligned asynchronous copy");
    if (valid < 0 || valid > BYTES) emulation::fault("an asynchronous copy of a wrong length");
    emulation::current->copies.back().push_back({to, from, BYTES, valid});
}
inline void copies_commit() { emulation::current->copies.emplace_back(); }
template <int PENDING>
void copies_wait() {
    auto &groups = emulation::current->copies;
    while (groups.size() > PENDING + 1) {
        for (const emulation::Copy &copy : groups.front()) {
            memset(copy.to, 0, size_t(copy.bytes));
            memcpy(copy.to, copy.from, size_t(copy.valid));
        }
        groups.erase(groups.begin());
    }
}

template <bool TRANSPOSED, int COUNT>
void load_matrices(uint32_t (&to)[COUNT], const void *row) {
    if (reinterpret_cast<uintptr_t>(row) % 16) emulation::fault("an unaligned row of a matrix");
    emulation::Matrices mine{to, static_cast<const uint16_t *>(row)};
    emulation::together<emulation::Matrices>(mine, emulation::load<COUNT, TRANSPOSED>);
}

template <typename Element>
void multiply_halves(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]) {
    emulation::Product mine{sums, left, right};
    emulation::together<emulation::Product>(mine, emulation::multiply<16, emulation::half_number<Element>>);
}
inline void multiply_tf32(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]) {
    emulation::Product mine{sums, left, right};
    emulation::together<emulation::Product>(mine, emulation::multiply<8, emulation::tf32_number>);
}

inline int cluster_rank() { return emulation::current->block->rank; }
inline void cluster_barrier() {
    using namespace emulation;
    if (++cluster_arrived < threads * int(blocks.size())) return wait();
    cluster_arrived = 0;
    for (size_t i = 0; i < blocks.size() * size_t(threads); ++i) fibers[i].state = READY;
}
inline float cluster_read(const float *from, int rank) {
    const auto at = reinterpret_cast<const unsigned char *>(from) - emulation::current->block->shared;
    float value;
    memcpy(&value, emulation::blocks[size_t(rank)].shared + at, 4);
    return value;
}

// --------------------------------------------------------------------------------------------------------- host

using Limits = emulation::Limits;

struct Launch {
    int64_t blocks;
    int threads, cluster;
    int64_t shared_bytes;
};

struct OnDevice {
    explicit OnDevice(int) {}
    int error = 0;
};

inline const char *error_text(int) { return "an emulated error"; }

inline int read_limits(int, Limits *limits) {
    *limits = emulation::limits;
    return 0;
}

template <typename... Parameters>
int launch(void (*kernel)(Parameters...), const Launch &how, void *, Parameters... parameters) {
    const std::function<void()> body = [&] { kernel(parameters...); };
    emulation::body = &body;
    gridDim.x = unsigned(how.blocks);
    const int64_t clusters = how.blocks / how.cluster;
    for (int64_t turn = 0; turn < clusters; ++turn) {
        const int64_t cluster = emulation::descending ? clusters - 1 - turn : turn;
        emulation::run_cluster(unsigned(cluster * how.cluster), how.cluster, how.threads, how.shared_bytes);
    }
    return 0;
}

template <typename... Parameters>
int clusters_at_once(void (*)(Parameters...), const Launch &how, int, const Limits &limits, int *count) {
    *count = limits.multiprocessors / how.cluster;
    return 0;
}

// The card that is emulated, and the order in which its warps and blocks run.
extern "C" __attribute__((visibility("default"), weak)) void encnet_emulation_set(int multiprocessors, int shared_bytes,
                                                                                   int most_in_cluster, int descending) {
    emulation::limits = {multiprocessors, shared_bytes, most_in_cluster};
    emulation::descending = descending;
}
