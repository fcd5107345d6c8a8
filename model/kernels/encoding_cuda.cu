// One pass of the Encoding op on a CUDA device for one type of x: chooses a kernel and how it is launched. build.py compiles
// this file once for each, with ENCNET_ELEMENT naming the type, ENCNET_BACKWARD the pass (0 or 1) and ENCNET_KERNELS the
// table that is exported.

#include <stdio.h>

#include "cuda_general.h"
#include "cuda_kernels.h"

#ifndef ENCNET_WIDTHS
#define ENCNET_WIDTHS 16, 32, 64 /* numbers of codewords to compile the tiles for, each for all up to it */
#endif

namespace {

using Element = ENCNET_ELEMENT;
constexpr bool BACKWARD = ENCNET_BACKWARD;

// Positions in a tile, first choice and second, where there is too little shared memory for the first; with products in
// so many parts. The third choice is 16 positions and as few parts as the rows of codes allow.
constexpr int SIZE = sizeof(Element);
constexpr int TILES[2] = {SIZE == 2 ? (BACKWARD ? 32 : 64) : BACKWARD ? 16 : 32, BACKWARD ? 16 : 32};
constexpr int PARTS = 4;

constexpr int64_t MOST_BLOCKS = 1 << 16;              // of the kernels whose blocks take more than one turn
constexpr int64_t GENERAL_BYTES = int64_t{64} << 20;  // of the general path: its partial sums', and its scratch's, about

using TilesKernel = void (*)(const Task);

struct Choice {
    TilesKernel kernel;
    int tile;
    int64_t fixed_bytes, tile_bytes[2];  // of shared memory: always, and with one stage or two
};

template <bool CHANNELS_LAST, int T, bool FEW_PARTS, int K>
Choice choice_of(int depth) {
    constexpr int ROW_WARPS = BACKWARD ? K / 4 : K / 8, FEWEST = ROW_WARPS < WARPS ? WARPS / ROW_WARPS : 1;
    constexpr int COUNT = FEW_PARTS ? FEWEST : PARTS;
    using S = Shared<Element, CHANNELS_LAST, K, T, COUNT, BACKWARD>;
    Choice made{nullptr, T, S::fixed_bytes(depth), {S::work_bytes(depth, 1), S::work_bytes(depth, 2)}};
    if constexpr (BACKWARD)
        made.kernel = encode_backward_tiles<Element, CHANNELS_LAST, K, T, COUNT>;
    else
        made.kernel = encode_tiles<Element, CHANNELS_LAST, K, T, COUNT>;
    return made;
}

// The first of the widths that holds so many codewords; none where they are too many.
template <bool CHANNELS_LAST, int T, bool FEW_PARTS, int K, int... WIDER>
Choice choice(int64_t codewords, int depth) {
    if (codewords <= K) return choice_of<CHANNELS_LAST, T, FEW_PARTS, K>(depth);
    if constexpr (sizeof...(WIDER) > 0)
        return choice<CHANNELS_LAST, T, FEW_PARTS, WIDER...>(codewords, depth);
    else
        return {};
}

// How one call runs. `choice.kernel` null: the general kernel.
struct Plan {
    Choice choice;
    Launch launch;
    int stages;
    int64_t tiles, parts, partials;  // partial sums in the workspace, of K * D + K floats each
    int64_t scratch_floats;          // beside them
};

// The most bytes out of 16, 8, 4 and 2 that divide every row's address, and hold at least one element.
int vector_of(const encnet_features &x, bool channels_last) {
    const int64_t size = sizeof(Element), row = channels_last ? x.position_stride : x.channel_stride;
    const uint64_t all = reinterpret_cast<uint64_t>(x.data) | uint64_t(x.batch_stride * size) | uint64_t(row * size);
    for (int vector = 16; vector > size; vector /= 2)
        if (all % unsigned(vector) == 0) return vector;
    return int(size);
}

// Fill in clusters, parts and blocks for a kernel that fits: few partial sums where that is fast enough. `*runs` stays
// false where the device cannot run it.
int spread(const CudaCall &call, const Limits &limits, Plan *plan, bool *runs) {
    const int64_t batch = call.sizes->batch;
    int64_t least_turns = 0;  // tiles that the busiest block takes
    for (int cluster = limits.most_in_cluster; cluster >= 1; cluster /= 2) {
        if (cluster > 1 && cluster > plan->tiles) continue;
        Launch launch = plan->launch;
        launch.cluster = cluster;
        int at_once = 0;
        if (int failed = clusters_at_once(plan->choice.kernel, launch, call.cuda->device, limits, &at_once)) return failed;
        if (at_once < 1) continue;
        const int64_t most = (plan->tiles + cluster - 1) / cluster;
        int64_t parts = at_once / batch < most ? at_once / batch : most;
        if (parts < 1) parts = 1;
        const int64_t items = batch * parts, clusters = items < at_once ? items : at_once;
        const int64_t turns = (items + clusters - 1) / clusters * ((most + parts - 1) / parts);
        if (*runs && 4 * turns > 3 * least_turns) continue;
        *runs = true;
        least_turns = turns;
        launch.blocks = clusters * cluster;
        plan->launch = launch;
        plan->parts = parts;
        plan->partials = BACKWARD ? (clusters > 1 ? clusters : 0) : (parts > 1 ? items : 0);
    }
    return 0;
}

template <int T, bool FEW_PARTS>
int try_tiles(const CudaCall &call, const Limits &limits, bool channels_last, Plan *plan, bool *runs) {
    const int depth = int(call.sizes->channels + 15) / 16 * 16;
    plan->choice = channels_last ? choice<true, T, FEW_PARTS, ENCNET_WIDTHS>(call.sizes->codewords, depth)
                                 : choice<false, T, FEW_PARTS, ENCNET_WIDTHS>(call.sizes->codewords, depth);
    if (!plan->choice.kernel) return 0;
    plan->tiles = (call.sizes->positions + T - 1) / T;
    for (plan->stages = 2; plan->stages >= 1; --plan->stages) {
        plan->launch.shared_bytes = plan->choice.fixed_bytes + plan->choice.tile_bytes[plan->stages - 1];
        if (plan->launch.shared_bytes > limits.shared_bytes) continue;
        if (int failed = spread(call, limits, plan, runs)) return failed;
        if (*runs) return 0;
    }
    return 0;
}

int plan_general(const CudaCall &call, const Limits &limits, Plan *plan) {
    const encnet_sizes &sizes = *call.sizes;
    const int64_t partial = 4 * (sizes.channels + 1) * sizes.codewords, scratch = 4 * scratch_floats(sizes.codewords);
    int64_t blocks = GENERAL_BLOCKS * limits.multiprocessors;
    if (blocks > GENERAL_BYTES / scratch) blocks = GENERAL_BYTES / scratch;
    if (blocks < 1) blocks = 1;
    plan->choice.kernel = nullptr;
    plan->tiles = (sizes.positions + SIDE - 1) / SIDE;
    plan->parts = blocks / sizes.batch;
    const int64_t most = GENERAL_BYTES / partial / sizes.batch;
    if (plan->parts > most) plan->parts = most;
    if (plan->parts > plan->tiles) plan->parts = plan->tiles;
    if (plan->parts < 1) plan->parts = 1;
    const int64_t items = sizes.batch * plan->parts;
    const int64_t room = BACKWARD ? GENERAL_BYTES / partial : items;
    plan->launch = {items < blocks ? items : blocks, GENERAL_THREADS, 1, 4 * (2 * DEEP * (SIDE + 4) + 2 * SIDE)};
    if (plan->launch.blocks > room) plan->launch.blocks = room < 1 ? 1 : room;
    plan->partials = BACKWARD ? plan->launch.blocks : items;
    plan->scratch_floats = plan->launch.blocks * scratch_floats(sizes.codewords);
    return 0;
}

int make_plan(const CudaCall &call, bool channels_last, Plan *plan) {
    Limits limits{};
    if (int failed = read_limits(call.cuda->device, &limits)) return failed;
    *plan = Plan{};
    plan->launch.threads = THREADS;
    bool runs = false;
    if (call.sizes->channels <= MOST_CHANNELS) {
        int failed = try_tiles<TILES[0], false>(call, limits, channels_last, plan, &runs);
        if constexpr (TILES[1] != TILES[0])
            if (!failed && !runs) failed = try_tiles<TILES[1], false>(call, limits, channels_last, plan, &runs);
        if (!failed && !runs) failed = try_tiles<16, true>(call, limits, channels_last, plan, &runs);
        if (failed || runs) return failed;
    }
    return plan_general(call, limits, plan);
}

Rows rows_of(const encnet_features *features, bool channels_last) {
    if (!features) return {};
    return {features->data, features->batch_stride,
            channels_last ? features->position_stride : features->channel_stride, vector_of(*features, channels_last)};
}

int run(const CudaCall &call, bool channels_last, const Plan &plan) {
    const encnet_sizes &sizes = *call.sizes;
    float *partials = static_cast<float *>(call.cuda->workspace);
    void *stream = call.cuda->stream;
    int failed;
    if (plan.choice.kernel) {
        Task task{};
        task.x = rows_of(call.x, channels_last), task.grad_x = rows_of(call.grad_x, channels_last);
        task.codewords = call.codewords, task.scale = call.scale, task.grad = call.grad;
        task.result = plan.partials ? nullptr : call.result, task.scale_result = call.scale_result;
        task.partials = partials;
        task.batch = sizes.batch, task.positions = sizes.positions, task.tiles = plan.tiles, task.parts = plan.parts;
        task.channels = int(sizes.channels), task.depth = int(sizes.channels + 15) / 16 * 16;
        task.codewords_count = int(sizes.codewords), task.stages = plan.stages, task.cluster = plan.launch.cluster;
        task.factor = sizes.factor;
        failed = launch(plan.choice.kernel, plan.launch, stream, task);
    } else {
        GeneralTask task{};
        const encnet_features &x = *call.x, &grad_x = call.grad_x ? *call.grad_x : x;
        task.x = x.data, task.grad_x = grad_x.data;
        task.x_strides[0] = x.batch_stride, task.x_strides[1] = x.channel_stride, task.x_strides[2] = x.position_stride;
        task.grad_x_strides[0] = grad_x.batch_stride, task.grad_x_strides[1] = grad_x.channel_stride;
        task.grad_x_strides[2] = grad_x.position_stride;
        task.codewords = call.codewords, task.scale = call.scale, task.grad = call.grad;
        task.partials = partials;
        task.scratch = partials + plan.partials * (sizes.channels + 1) * sizes.codewords;
        task.batch = sizes.batch, task.positions = sizes.positions, task.tiles = plan.tiles, task.parts = plan.parts;
        task.channels = sizes.channels, task.codewords_count = sizes.codewords, task.factor = sizes.factor;
        failed = launch(encode_general<Element, BACKWARD>, plan.launch, stream, task);
    }
    if (failed || !plan.partials) return failed;
    const int64_t outputs = sizes.codewords * sizes.channels * (BACKWARD ? 1 : sizes.batch) + (BACKWARD ? sizes.codewords : 0);
    int64_t blocks = (outputs + GENERAL_THREADS - 1) / GENERAL_THREADS;
    const Launch adding{blocks < MOST_BLOCKS ? blocks : MOST_BLOCKS, GENERAL_THREADS, 1, 0};
    const float *const sums = partials;
    if constexpr (BACKWARD)
        return launch(add_backward, adding, stream, sums, call.result, call.scale_result, sizes.codewords, sizes.channels,
                      plan.partials);
    else
        return launch(add_forward, adding, stream, sums, call.codewords, call.result, sizes.batch, sizes.codewords,
                      sizes.channels, plan.parts, sizes.factor);
}

int plan_and_run(const CudaCall &call) {
    const bool channels_last = call.x->position_stride != 1;
    Plan plan;
    if (int failed = make_plan(call, channels_last, &plan)) return failed;
    if (call.bytes) {
        *call.bytes = 4 * (plan.partials * (call.sizes->channels + 1) * call.sizes->codewords + plan.scratch_floats);
        return 0;
    }
    if (!call.text) return run(call, channels_last, plan);
    snprintf(call.text, call.text_room, "%s T=%d stages=%d shared=%lld cluster=%d blocks=%lld parts=%lld partials=%lld",
             plan.choice.kernel ? "tiles" : "general", plan.choice.kernel ? plan.choice.tile : SIDE, plan.stages,
             static_cast<long long>(plan.launch.shared_bytes), plan.launch.cluster,
             static_cast<long long>(plan.launch.blocks), static_cast<long long>(plan.parts),
             static_cast<long long>(plan.partials));
    return 0;
}

int call_on_device(const CudaCall &call) {
    const OnDevice current(call.cuda->device);
    const int failed = current.error ? current.error : plan_and_run(call);
    return failed ? ENCNET_CUDA_ERROR + failed : ENCNET_OK;
}

}  // namespace

extern const CudaKernels ENCNET_KERNELS = {call_on_device, error_text};
