// Attention on Hopper (compute capability 9.0): INT8 Q·Kᵀ, and P·V in FP8 e4m3 or 16 bit.
//
// A block has one warp that copies tiles, three that prepare where scores start, and WARPGROUPS
// warpgroups that compute, each for 64 query rows and all the keys, 128 at a time.
//
// Scores stay integers until the exponential. The accumulator of Q·Kᵀ starts at the bits of
// 1.5·2²³ as a float, plus the key's bias counted in the score's own units: the integer sum is then,
// read as a float, 1.5·2²³ + score, and the conversion, the bias and the scale cost one
// multiply-add in the exponent. Their order as integers is their order as floats.
//
// A row's maximum rises, and what was summed with the old one is rescaled, only where a score is
// HEADROOM above it.
//
// A scheduler gives out an instruction in two to four cycles, and that, not the tensor cores nor the
// exponentials, is what a step takes: so each of a step's instructions counts. A stage holds all that
// a step's products take, so that one barrier tells that it is there, one that it is free, and one
// place tells the rest; what only the key's scale decides is prepared by warps that have time.
//
// Where all scores of a step are so far below their rows' maxima that P is zero in e4m3 for a whole
// warpgroup, neither exponentials nor the product with V are taken. Queries begin with the keys at
// their own place, which are likely to hold their maxima. Whether P is zero is asked seldom where it
// never is.
//
// What a thread holds: of its warpgroup's 64 rows the two rows 16·warp + lane/4 and 8 below, called
// here row 0 and 1; of each 8 columns the two that begin at 2·(lane % 4).

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr int KEYS = 128;      // of a step
constexpr int CHANNELS = 128;  // of a head, padded
constexpr int SCALES = KEYS / KEYS_PER_SCALE;  // of a step's keys
constexpr int ROWS = 64;                       // of a warpgroup; they share a scale
constexpr float BASE = 12582912.0f;  // 1.5·2²³
// Up to here the exponent's offset, BASE times it, is exact to a hundredth.
constexpr float MOST_FACTOR = 0.0078125f;
constexpr int LOWEST = 0xff800000;   // minus infinity; below every score as an integer, too
// Warps that prepare, each another step: one alone, which awaits its loads, was 3 % slower.
constexpr int PREPARERS = 3;
// What 384 threads may share of a multiprocessor's registers.
constexpr int COPY_REGISTERS = 24, COMPUTE_REGISTERS = 240;
constexpr bool FP8 = V_FORMAT == 0;  // 0: e4m3, 1: bfloat16, 2: float16
constexpr float LOG2_P_MAX = FP8 ? 8.807354922057604f : 0.0f;  // P's largest is e4m3's, 448

constexpr int K_BYTES = KEYS * CHANNELS;
// In FP8 a channel of ones follows V's: its products are the sums of P's rows.
constexpr int ONES_BYTES = FP8 ? 8 * KEYS : 0;
constexpr int V_BYTES = KEYS * CHANNELS * (FP8 ? 1 : 2);
constexpr int Q_BYTES = ROWS * CHANNELS;
constexpr int SUMS = FP8 ? 68 : 64;  // accumulators of P·V a thread
// The FP8 product adds in 14 bits: after so many steps its sums go to the output, in float32.
constexpr int STEPS_OF_SUMS = 4;
// Where a row's maximum rises by less than LEAP, P is relative to so many powers of two above it, so
// that most later maxima are below that; P of the maximum itself stays exact. A peak takes P's whole
// range: what lies far below it, many keys, may weigh as much.
constexpr float HEADROOM = FP8 ? 2.0f : 0.0f, LEAP = 4.0f;
// Where P's products begin with half of the keys, while the other half's exponentials are made.
constexpr bool IN_HALVES = !FP8;
// P under 2⁻¹⁰, half of the least of e4m3, is rounded to zero.
constexpr float NOTHING = -10.01f;
// Whether P is zero is asked in so many steps after one where it was, and where it is not, after ever
// more steps, up to so many.
constexpr int PATIENCE = 8, MOST_QUIET = 32;

// What the scores of keys that share a scale are worth: each so many powers of two, BASE minus so
// many; and where in scores a limit of zero lies, and one more power of two.
struct __align__(16) Worth {
    float factor[SCALES], minus[SCALES], zero[SCALES], units[SCALES];
};

// How a warpgroup's scores begin.
struct Start {
    int4 scores[KEYS / 2];  // of two keys, twice
    Worth worth;
};

// What a step's products take: the keys of the next scores, and the values of the last ones.
struct __align__(1024) Stage {
    char k[K_BYTES];
    char v[V_BYTES + ONES_BYTES];
    Start start[WARPGROUPS];
    u64 full, free;
};

struct __align__(1024) Shared {
    Stage stages[STAGES];
    char q[WARPGROUPS][Q_BYTES];
    u64 q_full;
};

static_assert(sizeof(Shared) == SHARED_BYTES, "the launcher asks for what this takes");

struct __align__(64) TensorMap {
    char bytes[128];
};

struct Arguments {
    const float *q_scale;  // [B·H, count_padded], equal within ROWS; makes powers of two
    const float *q_dots;   // [B·H, count_padded], what the log-sum-exp lacks, or null
    const float *k_scale;  // [B·Hk, keys_padded], equal within KEYS_PER_SCALE
    const float *k_bias;   // [B·H, keys_padded], added to a key's scores, or null
    const float *v_scale;  // [B·Hk, CHANNELS], FP8 only
    const int *blocks;     // the blocks of keys to visit for each block of queries, or null
    const int *block_counts, *block_tails;  // how many they are, and whether the partial one is too
    void *out;             // [B, H, count, size], 16 bit, or e4m3 times out_scale
    float *lse;            // [B·H, count] or null
    const float *out_scale;  // [B], of an output in e4m3, whose channels are contiguous; or null
    i64 o_b, o_h, o_n, o_d;
    int heads, shared, count, count_padded, keys, keys_padded, size, out_is_half;
    int block_b, block_h;  // between the lists of batches and of heads
    int zero;              // which the compiler can't know
};

// ---- PTX ---------------------------------------------------------------------------------------

__device__ __forceinline__ u32 address(const void *pointer) {
    return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void start_barrier(u64 &barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(&barrier)), "r"(arrivals));
}

__device__ __forceinline__ void expect(u64 &barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(&barrier)),
                 "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void arrive(u64 &barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(&barrier)) : "memory");
}

__device__ __forceinline__ void arrive_if(bool so, u64 &barrier) {
    asm volatile(
        "{\n.reg .pred so;\nsetp.ne.b32 so, %1, 0;\n"
        "@so mbarrier.arrive.shared::cta.b64 _, [%0];\n}" ::"r"(address(&barrier)),
        "r"(int(so))
        : "memory");
}

__device__ __forceinline__ void wait(u64 &barrier, int parity) {
    asm volatile(
        "{\n.reg .pred done;\nagain:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}" ::"r"(address(&barrier)),
        "r"(parity)
        : "memory");
}

// Whether a phase is over, asked early so that the answer is there when it is needed.
__device__ __forceinline__ bool over(u64 &barrier, int parity) {
    int done;
    asm volatile(
        "{\n.reg .pred done;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.b32 %0, 1, 0, done;\n}"
        : "=r"(done)
        : "r"(address(&barrier)), "r"(parity)
        : "memory");
    return done;
}

__device__ __forceinline__ void copy_tile(void *to, const TensorMap &map, int x, int y, u64 &full) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3}], [%4];" ::"r"(address(to)),
        "l"(&map), "r"(x), "r"(y), "r"(address(&full))
        : "memory");
}

__device__ __forceinline__ void copy_tile(void *to, const TensorMap &map, int x, int y, int z,
                                          int w, u64 &full) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(address(to)),
        "l"(&map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(address(&full))
        : "memory");
}

// A tile in shared memory as wgmma takes it: rows of 128 bytes, swizzled by 128. `leading` is the
// distance of the second 64 columns of a tile that is not contiguous along the summed dimension.
__device__ __forceinline__ u64 descriptor(const void *tile, int leading = 0) {
    // By halves, so that what is constant needs no arithmetic.
    u32 low = address(tile) >> 4 | (leading >> 4) << 16, high = 1024 >> 4 | 1 << 30;
    u64 made;
    asm("mov.b64 %0, {%1, %2};" : "=l"(made) : "r"(low), "r"(high));
    return made;
}

// By a shuffle: the assembler would find it anew for each product.
__device__ __forceinline__ u64 kept(u64 descriptor) {
    u32 low = __shfl_sync(~0u, u32(descriptor), 0), high = descriptor >> 32;
    u64 made;
    asm("mov.b64 %0, {%1, %2};" : "=l"(made) : "r"(low), "r"(high));
    return made;
}

__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int PENDING> __device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Whether it is so for any thread of a warpgroup.
__device__ __forceinline__ bool any_of_warpgroup(bool x, int group) {
    int any;
    asm volatile(
        "{\n.reg .pred one, any;\n"
        "setp.ne.b32 one, %1, 0;\n"
        "barrier.cta.red.or.pred any, %2, 128, one;\n"
        "selp.b32 %0, 1, 0, any;\n}"
        : "=r"(any)
        : "r"(int(x)), "r"(group + 1)
        : "memory");
    return __shfl_sync(~0u, any, 0);  // so that the compiler knows it to be the same in a warp
}

// The compiler may not keep a copy of an accumulator beyond this line.
template <int N> __device__ __forceinline__ void pin(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
template <int N> __device__ __forceinline__ void pin(u32 (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+r"(x[i])::"memory");
}
template <int N> __device__ __forceinline__ void pin(int (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

#define EIGHT(T, x, i) T(x[i]), T(x[i + 1]), T(x[i + 2]), T(x[i + 3]), T(x[i + 4]), T(x[i + 5]), \
    T(x[i + 6]), T(x[i + 7])
#define ALL(T, x)                                                                                 \
    EIGHT(T, x, 0), EIGHT(T, x, 8), EIGHT(T, x, 16), EIGHT(T, x, 24), EIGHT(T, x, 32),            \
        EIGHT(T, x, 40), EIGHT(T, x, 48), EIGHT(T, x, 56)
#define IN_OUT_INT(x) "+r"(x)
#define IN_OUT_FLOAT(x) "+f"(x)
#define ACCUMULATOR_LIST                                                                            \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                     \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "            \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "            \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define ACCUMULATORS ACCUMULATOR_LIST "}, "

__device__ __forceinline__ void multiply_scores(int (&s)[64], u64 q, u64 k) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 " ACCUMULATORS "%64, %65, 1;"
                 : ALL(IN_OUT_INT, s)
                 : "l"(q), "l"(k));
}

__device__ __forceinline__ void multiply_values(float (&t)[64], const u32 *p, u64 v) {
#define VALUES(types)                                                                             \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." types ACCUMULATORS                \
                 "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;"                                         \
                 : ALL(IN_OUT_FLOAT, t)                                                           \
                 : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v))
    if constexpr (V_FORMAT == 1) {
        VALUES("bf16.bf16 ");
    } else {
        VALUES("f16.f16 ");
    }
#undef VALUES
}

__device__ __forceinline__ void multiply_values(float (&t)[68], const u32 *p, u64 v, int add) {
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %73, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n136k32.f32.e4m3.e4m3 " ACCUMULATOR_LIST
                 ", %64, %65, %66, %67}, {%68, %69, %70, %71}, %72, add, 1, 1;\n}"
                 : ALL(IN_OUT_FLOAT, t), "+f"(t[64]), "+f"(t[65]), "+f"(t[66]), "+f"(t[67])
                 : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v), "r"(add));
}

__device__ __forceinline__ float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2_of(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ u32 four_e4m3(float a, float b, float c, float d) {
    u32 packed;
    asm("{\n.reg .b16 low, high;\n"
        "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};\n}"
        : "=r"(packed)
        : "f"(a), "f"(b), "f"(c), "f"(d));
    return packed;
}

__device__ __forceinline__ unsigned short two_e4m3(float a, float b) {
    unsigned short packed;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %2, %1;" : "=h"(packed) : "f"(a), "f"(b));
    return packed;
}

// Two values of float16 or bfloat16.
__device__ __forceinline__ u32 two_of(float a, float b, bool half) {
    u32 packed;
    if (half) {
        asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(packed) : "f"(a), "f"(b));
    } else {
        asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(packed) : "f"(a), "f"(b));
    }
    return packed;
}

// Registers go from the warps that copy and prepare to those that compute.
template <int COUNT> __device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// What threads have written to shared memory is seen by products and copies.
__device__ __forceinline__ void show_writes() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ float sum_across_row(float x) {
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
        x += __shfl_xor_sync(0xffffffff, x, distance);
    }
    return x;
}

// ---- The copying warp --------------------------------------------------------------------------

// Which blocks of keys a block of queries visits, in order: those of its list and then, maybe, the
// last one, which is not whole; or all, in FP8 from the queries' own place on.
struct Visit {
    const int *blocks;
    int listed, steps, last, first;
    __device__ Visit(const Arguments &a, int head, int query_block) {
        blocks = nullptr;
        steps = listed = (a.keys + KEYS - 1) / KEYS;
        last = a.keys / KEYS;
        first = FP8 && query_block < steps ? query_block : 0;
        if (a.blocks) {
            int row = head / a.heads * a.block_b + head % a.heads * a.block_h + query_block;
            blocks = a.blocks + i64(row) * last;
            listed = a.block_counts[row];
            steps = listed + a.block_tails[row];
        }
    }
    __device__ int operator[](int step) const {
        if (!blocks) {
            int place = step + first;
            return place < steps ? place : place - steps;
        }
        return step < listed ? blocks[step] : last;
    }
};

__device__ __forceinline__ void copy_values(Stage &stage, const Arguments &a,
                                            const TensorMap &v_map, int head, int key_head,
                                            int key) {
    if constexpr (FP8) {
        copy_tile(stage.v, v_map, key, key_head * CHANNELS, stage.full);
    } else {
        int batch = head / a.heads, one = key_head - batch * (a.heads / a.shared);
        copy_tile(stage.v, v_map, 0, key, one, batch, stage.full);
        copy_tile(stage.v + V_BYTES / 2, v_map, 64, key, one, batch, stage.full);
    }
}

__device__ __forceinline__ void copy(Shared &shared, const Arguments &a, const TensorMap &q_map,
                                     const TensorMap &k_map, const TensorMap &v_map, int head,
                                     int key_head, const Visit &visit) {
    int row = head * a.count_padded + blockIdx.x * ROWS * WARPGROUPS;
    expect(shared.q_full, WARPGROUPS * Q_BYTES);
    for (int group = 0; group < WARPGROUPS; ++group) {
        copy_tile(shared.q[group], q_map, 0, row + group * ROWS, shared.q_full);
    }
    int key = 0;
#pragma unroll 1
    for (int step = 0; step <= visit.steps; ++step) {
        Stage &stage = shared.stages[step % STAGES];
        bool scores = step < visit.steps, values = step > 0;
        wait(stage.free, step / STAGES & 1 ^ 1);
        expect(stage.full, scores * K_BYTES + values * V_BYTES);
        if (values) copy_values(stage, a, v_map, head, key_head, key);
        if (!scores) break;
        key = visit[step] * KEYS;
        copy_tile(stage.k, k_map, 0, key_head * a.keys_padded + key, stage.full);
    }
}

// ---- The preparing warps -----------------------------------------------------------------------

// Where the scores of a lane's four keys start, from the first of them on, and what they are worth.
// Keys beyond the last start at minus infinity: theirs are rows of zeros, so they stay there.
__device__ __forceinline__ void start_keys(Start &start, float factor, const float4 &added, int key,
                                           int keys, int lane) {
    float units = reciprocal(factor);
    int4 *scores = &start.scores[lane * 2];
    int x = key < keys ? __float_as_int(fmaf(added.x, units, BASE)) : LOWEST;
    int y = key + 1 < keys ? __float_as_int(fmaf(added.y, units, BASE)) : LOWEST;
    scores[0] = {x, y, x, y};
    x = key + 2 < keys ? __float_as_int(fmaf(added.z, units, BASE)) : LOWEST;
    y = key + 3 < keys ? __float_as_int(fmaf(added.w, units, BASE)) : LOWEST;
    scores[1] = {x, y, x, y};
    if (lane % (32 / SCALES) == 0) {
        int part = lane / (32 / SCALES);
        // Of scores worth much some are always taken to be above.
        bool large = factor > MOST_FACTOR;
        start.worth.factor[part] = factor;
        start.worth.minus[part] = -BASE * factor;
        start.worth.zero[part] = large ? __int_as_float(LOWEST) : fmaf(LOG2_P_MAX, units, BASE);
        start.worth.units[part] = large ? 1.0f : units;
    }
}

__device__ __forceinline__ void prepare(Shared &shared, const Arguments &a, int head, int key_head,
                                        const Visit &visit) {
    int lane = threadIdx.x % 32, first = threadIdx.x / 32 - 1;
    const float *bias = a.k_bias ? a.k_bias + i64(head) * a.keys_padded : nullptr;
    const float *k_scale = a.k_scale + i64(key_head) * a.keys_padded;
    const float *q_scale = a.q_scale + i64(head) * a.count_padded;
    for (int step = first; step < visit.steps; step += PREPARERS) {
        Stage &stage = shared.stages[step % STAGES];
        int parity = step / STAGES & 1, key = visit[step] * KEYS + lane * 4;
        float of_keys = k_scale[key];  // a lane's four keys share it
        float4 added = {0.0f, 0.0f, 0.0f, 0.0f};
        if (bias) added = *reinterpret_cast<const float4 *>(bias + key);
        wait(stage.free, parity ^ 1);
#pragma unroll 1
        for (int group = 0; group < WARPGROUPS; ++group) {
            int row = min(int(blockIdx.x * WARPGROUPS + group) * ROWS, a.count_padded - ROWS);
            float factor = fmaxf(q_scale[row] * of_keys, 1e-37f);
            start_keys(stage.start[group], factor, added, key, a.keys, lane);
        }
        __syncwarp();
        if (lane == 0) arrive(stage.full);
    }
    // The last stage has values alone.
    if (visit.steps && visit.steps % PREPARERS == first && lane == 0) {
        Stage &stage = shared.stages[visit.steps % STAGES];
        wait(stage.free, visit.steps / STAGES & 1 ^ 1);
        arrive(stage.full);
    }
}

// ---- The computing warpgroups ------------------------------------------------------------------

// What a thread knows of its two rows.
struct Rows {
    float limit[2];  // a score so much above it has the largest P; HEADROOM over a maximum
    float total[2];  // of this thread's columns, until the end
    float kept[2];   // FP8: what maxima that rose since the output last took in sums leave of it
};

__device__ __forceinline__ void start_scores(int *s, const int4 *starts, int eight) {
    int4 start = starts[eight * 4];
    s[0] = start.x;
    s[1] = start.y;
    s[2] = start.z;
    s[3] = start.w;
}

__device__ __forceinline__ void issue_scores(int (&s)[64], u64 q, Stage &stage) {
    u64 k = descriptor(stage.k);
    pin(s);
    fence();
#pragma unroll
    for (int part = 0; part < CHANNELS / 32; ++part) {
        multiply_scores(s, q + part * 2, k + part * 2);  // 32 bytes further
    }
    commit();
}

// The products of P with quarters of the step's keys; without `add` the sums begin anew.
template <int BEGIN, int END>
__device__ __forceinline__ void issue_values(float (&t)[SUMS], const u32 *p, Stage &stage,
                                             int add) {
    // From K's, beyond which V lies: that is less arithmetic than from its own address.
    u64 v = descriptor(stage.k, FP8 ? 0 : V_BYTES / 2) + K_BYTES / 16;
    pin(t);
    fence();
#if V_FORMAT == 0
#pragma unroll
    for (int part = BEGIN; part < END; ++part) {
        // 32 keys are 32 bytes further.
        multiply_values(t, p + part * 4, v + part * 2, part ? 1 : add);
    }
#else
#pragma unroll
    for (int part = BEGIN * 2; part < END * 2; ++part) {
        multiply_values(t, p + part * 4, v + part * 128);  // 16 keys are 16 rows further
    }
#endif
    commit();
}

// The largest of a thread's scores, as they are, in each of its rows and of each scale.
__device__ __forceinline__ void find_largest(const int (&s)[64], int (&most)[2][SCALES]) {
    constexpr int SHARE = 64 / SCALES;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
        for (int part = 0; part < SCALES; ++part) {
            int first = part * SHARE + row * 2;
            most[row][part] = max(s[first], s[first + 1]);
#pragma unroll
            for (int i = first + 4; i < first + SHARE; i += 4) {
                most[row][part] = max(max(s[i], s[i + 1]), most[row][part]);
            }
        }
    }
}

// … in powers of two.
__device__ __forceinline__ void scale_largest(const int (&most)[2][SCALES], const Worth &worth,
                                              float (&largest)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        largest[row] = (__int_as_float(most[row][0]) - BASE) * worth.factor[0];
        if (SCALES == 2) {
            float other = (__int_as_float(most[row][SCALES - 1]) - BASE) * worth.factor[SCALES - 1];
            largest[row] = fmaxf(largest[row], other);
        }
    }
}

// Whether a thread has a score above its row's limit; rounded to a score's own units.
__device__ __forceinline__ bool is_above(const int (&most)[2][SCALES], const Worth &worth,
                                         const Rows &rows) {
    bool above = false;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
        for (int part = 0; part < SCALES; ++part) {
            float limit = fmaf(rows.limit[row], worth.units[part], worth.zero[part]);
            above |= most[row][part] > __float_as_int(limit);
        }
    }
    return above;
}

// New limits of the rows, and what is left of the sums that were taken with the old ones.
__device__ __forceinline__ void raise(float (&largest)[2], Rows &rows, float (&sums)[SUMS]) {
    float rescale[2];
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
        float other[2];
#pragma unroll
        for (int row = 0; row < 2; ++row) other[row] = __shfl_xor_sync(~0u, largest[row], distance);
#pragma unroll
        for (int row = 0; row < 2; ++row) largest[row] = fmaxf(largest[row], other[row]);
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        float limit = rows.limit[row];
        float above = largest[row] - LOG2_P_MAX;
        if (above > limit) limit = above + (above - limit <= LEAP ? HEADROOM : 0.0f);
        rescale[row] = exp2_of(rows.limit[row] - limit);
        rows.limit[row] = limit;
        if (FP8) rows.kept[row] *= rescale[row]; else rows.total[row] *= rescale[row];
    }
#pragma unroll
    for (int i = 0; i < SUMS; ++i) sums[i] *= rescale[i / 2 % 2];
}

// FP8: the output takes in the sums of P·V, and the divisor those of P, from the channel of ones.
__device__ __forceinline__ void take_in(float (&o)[64], const float (&t)[SUMS], Rows &rows) {
#pragma unroll
    for (int i = 0; i < 64; ++i) o[i] = fmaf(o[i], rows.kept[i / 2 % 2], t[i]);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        rows.total[row] = fmaf(rows.total[row], rows.kept[row], t[SUMS - 4 + row * 2]);
        rows.kept[row] = 1.0f;
    }
}

// x, but not before y is known: what follows is scheduled behind it.
__device__ __forceinline__ float after(float x, float y, int zero) {
    return __int_as_float(__float_as_int(x) | (__float_as_int(y) & zero));
}

// P from the scores of the keys from BEGIN to END, eight of a row's keys at a time; meanwhile the
// next step's scores start.
//
// Exponentials have few units, so everything else is to be done between them. The assembler would
// put all of them last, and await each; so after each EVERY eights, those that follow wait, by their
// data, for P of the keys APART eights before.
template <int BEGIN, int END>
__device__ __forceinline__ void exponentials(int (&s)[64], u32 *p, float (&offset)[2][SCALES],
                                             const float (&factor)[SCALES], Rows &rows,
                                             const int4 *starts, int zero) {
    constexpr int APART = SCALES == 2 ? 2 : 4, EVERY = SCALES == 2 ? 1 : 2;  // as measured best
#pragma unroll
    for (int i = BEGIN; i < END; i += 8) {
        int part = i / (64 / SCALES);
        if (FP8 && i >= BEGIN + 8 * APART && (i - BEGIN) / 8 % EVERY == 0) {
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                float earlier = __int_as_float(p[i / 4 - 2 * APART + row]);
                offset[row][part] = after(offset[row][part], earlier, zero);
            }
        }
        float e[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            float score = __int_as_float(s[i + j]);
            e[j] = exp2_of(fmaf(score, factor[part], offset[j / 2 % 2][part]));
        }
        start_scores(s + i, starts, i / 4);
        start_scores(s + i + 4, starts, i / 4 + 1);
        if (FP8) {
            p[i / 4] = four_e4m3(e[0], e[1], e[4], e[5]);
            p[i / 4 + 1] = four_e4m3(e[2], e[3], e[6], e[7]);
        } else {
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                rows.total[row] += e[row * 2] + e[row * 2 + 1] + (e[row * 2 + 4] + e[row * 2 + 5]);
            }
#pragma unroll
            for (int j = 0; j < 8; j += 2) p[i / 2 + j / 2] = two_of(e[j], e[j + 1], V_FORMAT == 2);
        }
    }
}

__device__ __forceinline__ void release(u64 &barrier, int lane) {
    arrive_if(lane == 0, barrier);
}

// Where an output's row begins, in elements.
__device__ __forceinline__ i64 row_of(const Arguments &a, int head, int n) {
    return i64(head / a.heads) * a.o_b + i64(head % a.heads) * a.o_h + i64(n) * a.o_n;
}

// A row's channels of this thread, two of each eight, as they are.
__device__ __forceinline__ void store_row(const float2 (&values)[16], const Arguments &a, i64 begin,
                                          bool in_e4m3) {
    int channel = threadIdx.x % 4 * 2;
    auto *narrow = static_cast<char *>(a.out) + begin + channel;
    auto *wide = static_cast<unsigned short *>(a.out) + begin + channel * a.o_d;
    bool in_pairs = a.o_d == 1 && reinterpret_cast<u64>(wide) % 4 == 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        if (i * 8 >= a.size) break;
        if (in_e4m3) {
            u32 packed = two_e4m3(values[i].x, values[i].y);
            *reinterpret_cast<unsigned short *>(narrow + i * 8) = packed;
            continue;
        }
        u32 packed = two_of(values[i].x, values[i].y, a.out_is_half);
        if (in_pairs) {
            *reinterpret_cast<u32 *>(wide + i * 8) = packed;
        } else {
            wide[i * 8 * a.o_d] = packed & 0xffff;
            wide[(i * 8 + 1) * a.o_d] = packed >> 16;
        }
    }
}

__device__ __forceinline__ void store(const float (&o)[64], Rows &rows, const Arguments &a,
                                      int head, int key_head, int first) {
    int row_in_block = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    bool in_e4m3 = FP8 && a.out_scale;
    float2 of_channels[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        int channel = key_head * CHANNELS + i * 8 + threadIdx.x % 4 * 2;
        of_channels[i] = {1.0f, 1.0f};
        if (FP8) of_channels[i] = *reinterpret_cast<const float2 *>(a.v_scale + channel);
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        float total = sum_across_row(rows.total[row]);
        int n = first + row_in_block + row * 8;
        if (n >= a.count) continue;
        float scale = total > 0.0f ? 1.0f / total : 0.0f;
        if (in_e4m3) scale /= a.out_scale[head / a.heads];
        float2 values[16];
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            values[i].x = o[i * 4 + row * 2] * scale * of_channels[i].x;
            values[i].y = o[i * 4 + row * 2 + 1] * scale * of_channels[i].y;
        }
        store_row(values, a, row_of(a, head, n), in_e4m3);
        if (a.lse && threadIdx.x % 4 == 0) {
            float removed = a.q_dots[i64(head) * a.count_padded + n];
            float value = (rows.limit[row] + log2_of(total)) * 0.6931471805599453f;
            a.lse[i64(head) * a.count + n] = value + removed;
        }
    }
}

// What a computing thread holds from step to step.
struct State {
    int s[64];
    float o[64], t[SUMS];
    u32 p[FP8 ? 16 : 32];
    Rows rows;
    Worth worth;
    u64 q;  // the descriptor of its rows of Q
    int group, lane, zero;
    int place, parity;  // of the next stage
    int summed;         // how many steps' products the output has not taken in

    // 16-bit products add exactly enough to stay in the output.
    __device__ __forceinline__ auto &sums() {
        if constexpr (FP8) return t; else return o;
    }
};

// The scores of a stage's keys, from where they start.
__device__ __forceinline__ void begin_scores(State &x, Stage &stage) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        start_scores(x.s + i * 4, &stage.start[x.group].scores[x.lane % 4], i);
    }
}

// Whether P is zero for a whole warpgroup, in all of the step's keys.
__device__ __forceinline__ int is_nothing(const int (&most)[2][SCALES], const State &x) {
    float largest[2];
    scale_largest(most, x.worth, largest);
    bool counts = largest[0] > x.rows.limit[0] + NOTHING || largest[1] > x.rows.limit[1] + NOTHING;
    return !any_of_warpgroup(counts, x.group);
}

// A stage by its distance from the first, in bytes: what is carried from step to step, because
// nothing else needs as little arithmetic.
__device__ __forceinline__ Stage &stage_at(Shared &shared, int place) {
    return *reinterpret_cast<Stage *>(reinterpret_cast<char *>(shared.stages) + place);
}
constexpr int LAST_PLACE = (STAGES - 1) * sizeof(Stage);

// On to the stage after it.
__device__ __forceinline__ Stage &advance(State &x, Shared &shared) {
    bool wraps = x.place == LAST_PLACE;
    x.place = wraps ? 0 : x.place + int(sizeof(Stage));
    x.parity ^= wraps;
    return stage_at(shared, x.place);
}

// Limits rise to scores above them. Scores worth so much that the exponent's offset would be rounded,
// which are always taken to be above, lose BASE here instead of in the exponent.
__device__ __forceinline__ void treat_those_above(State &x, const int (&most)[2][SCALES]) {
    float largest[2];
    scale_largest(most, x.worth, largest);
    raise(largest, x.rows, x.sums());
    if (fmaxf(x.worth.factor[0], x.worth.factor[SCALES - 1]) > MOST_FACTOR) {
        asm volatile("" ::: "memory");  // keeps it a branch
#pragma unroll
        for (float &minus : x.worth.minus) minus = 0.0f;
#pragma unroll
        for (int i = 0; i < 64; ++i) x.s[i] = __float_as_int(__int_as_float(x.s[i]) - BASE);
    }
}

// What a score, times its worth, lacks to be P's exponent.
__device__ __forceinline__ void find_offsets(const State &x, float (&offset)[2][SCALES]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
        for (int part = 0; part < SCALES; ++part) {
            offset[row][part] = x.worth.minus[part] - x.rows.limit[row];
        }
    }
}

// The scores of a step, of which the maxima are known, become P; its products with V are begun, and
// the next step's scores.
__device__ __forceinline__ void take_step(State &x, Shared &shared, const int (&most)[2][SCALES],
                                          Stage &last, Stage &next) {
    bool there = over(next.full, x.parity);
    wait_products<0>();
    pin(x.sums());
    bool above = __any_sync(~0u, is_above(most, x.worth, x.rows));
    release(last.free, x.lane);
    if (above) treat_those_above(x, most);
    float offset[2][SCALES];
    find_offsets(x, offset);
    if constexpr (FP8) {
        if (x.summed == STEPS_OF_SUMS) {
            asm volatile("" ::: "memory");
            take_in(x.o, x.t, x.rows);
            x.summed = 0;
        }
    }
    if (!there) wait(next.full, x.parity);
    const int4 *starts = &next.start[x.group].scores[x.lane % 4];
    exponentials<0, IN_HALVES ? 32 : 64>(x.s, x.p, offset, x.worth.factor, x.rows, starts, x.zero);
    if constexpr (IN_HALVES) {
        issue_values<0, 2>(x.sums(), x.p, next, 1);
        exponentials<32, 64>(x.s, x.p, offset, x.worth.factor, x.rows, starts, x.zero);
    }
    // After the last step these are products of stale bytes, which nothing reads.
    issue_scores(x.s, x.q, next);
    issue_values<IN_HALVES ? 2 : 0, 4>(x.sums(), x.p, next, x.summed);
    ++x.summed;
    x.worth = next.start[x.group].worth;
    wait_products<1>();
}

// A step whose P is zero: the scores of the next alone.
__device__ __forceinline__ void leave_out(State &x, Shared &shared, Stage &last, Stage &next) {
    wait_products<0>();
    pin(x.sums());
    __syncwarp();
    release(last.free, x.lane);
    wait(next.full, x.parity);
    begin_scores(x, next);
    issue_scores(x.s, x.q, next);
    x.worth = next.start[x.group].worth;
    wait_products<0>();
}

__device__ __forceinline__ void begin(State &x, Shared &shared, int zero) {
    // By a shuffle, or the assembler would read the slow register of the thread's number anew, and
    // would not know that a warp's group is one.
    x.group = __shfl_sync(~0u, int(threadIdx.x) / 128 - 1, 0);
    x.lane = __shfl_sync(~0u, int(threadIdx.x) % 32, threadIdx.x % 32);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        x.rows.limit[row] = __int_as_float(LOWEST);
        x.rows.total[row] = 0.0f;
        x.rows.kept[row] = 1.0f;
    }
#pragma unroll
    for (float &one : x.o) one = 0.0f;
#pragma unroll
    for (float &one : x.t) one = 0.0f;
    x.q = kept(descriptor(shared.q[x.group]));
    x.zero = zero;
    x.place = x.parity = x.summed = 0;
}

__device__ __forceinline__ void compute(Shared &shared, const Arguments &a, int head, int key_head,
                                        const Visit &visit) {
    State x;
    begin(x, shared, a.zero);
    int first_row = (blockIdx.x * WARPGROUPS + x.group) * ROWS;
    wait(shared.q_full, 0);
    if (!visit.steps) return store(x.o, x.rows, a, head, key_head, first_row);
    Stage &first = shared.stages[0];
    wait(first.full, 0);
    begin_scores(x, first);
    x.worth = first.start[x.group].worth;
    issue_scores(x.s, x.q, first);
    wait_products<0>();
    // Whether P is zero is asked at some steps; after the last there is nothing to ask of.
    int look_at = FP8 ? 0 : visit.steps, quiet = 1;
#pragma unroll 1
    for (int step = 0;; ++step) {
        int most[2][SCALES];
        Stage &last = stage_at(shared, x.place);
        Stage &next = advance(x, shared);
        pin(x.s);
        find_largest(x.s, most);
        if (step == look_at) {
            if (step == visit.steps) break;
            bool nothing = is_nothing(most, x);
            quiet = nothing ? -PATIENCE : quiet < 0 ? quiet + 1 : min(2 * quiet + 1, MOST_QUIET);
            look_at = min(step + max(quiet, 1), visit.steps);
            if (nothing) {
                leave_out(x, shared, last, next);
                continue;
            }
        }
        take_step(x, shared, most, last, next);
    }
    wait_products<0>();
    pin(x.sums());
    if constexpr (FP8) {
        if (x.summed) take_in(x.o, x.t, x.rows);  // else no limit has risen since
    }
    store(x.o, x.rows, a, head, key_head, first_row);
}

extern "C" __global__ void __launch_bounds__((WARPGROUPS + 1) * 128, 1)
    attention(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
              const __grid_constant__ TensorMap v_map, const Arguments a) {
    extern __shared__ __align__(1024) char memory[];
    Shared &shared = *reinterpret_cast<Shared *>(memory);
    int head = blockIdx.y, key_head = head / a.shared;
    if (threadIdx.x == 0) {
        start_barrier(shared.q_full, 1);
        for (Stage &stage : shared.stages) {
            start_barrier(stage.full, 2);
            start_barrier(stage.free, WARPGROUPS * 4);
        }
    }
    if (FP8) {
        for (int i = threadIdx.x; i < STAGES * ONES_BYTES / 4; i += blockDim.x) {
            int place = i % (8 * KEYS / 4);
            int *ones = reinterpret_cast<int *>(shared.stages[i / (8 * KEYS / 4)].v + V_BYTES);
            ones[place] = place < KEYS / 4 ? 0x38383838 : 0;  // a row of ones, seven of zeros
        }
    }
    show_writes();
    __syncthreads();
    Visit visit(a, head, blockIdx.x);
    if (threadIdx.x < 128) {
        give_registers<COPY_REGISTERS>();
        if (threadIdx.x >= 32) prepare(shared, a, head, key_head, visit);
        if (threadIdx.x == 0) copy(shared, a, q_map, k_map, v_map, head, key_head, visit);
    } else {
        take_registers<COMPUTE_REGISTERS>();
        compute(shared, a, head, key_head, visit);
    }
}
