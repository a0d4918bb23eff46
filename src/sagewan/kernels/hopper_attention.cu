// Attention on Hopper (compute capability 9.0): INT8 Q·Kᵀ, and P·V in FP8 e4m3 or 16 bit.
//
// A block has one warp that copies tiles, one that prepares where scores start, and WARPGROUPS
// warpgroups that compute, each for 64 query rows and all the keys, 128 at a time.
//
// Scores stay integers until the exponential. The accumulator of Q·Kᵀ starts at the bits of
// 1.5·2²³ as a float, plus the key's bias counted in the score's own units: the integer sum is then,
// read as a float, 1.5·2²³ + score, and the conversion, the bias and the scale cost one
// multiply-add in the exponent. Their order as integers is their order as floats.
//
// Where all scores of a step are so far below their rows' maxima that P is zero in e4m3, its
// exponentials are not taken, and if that is so for a warpgroup, its product with V is not either.
// Queries begin with the keys at their own place, which are likely to hold their maxima.
//
// What a thread holds: of its warpgroup's 64 rows the two rows 16·warp + lane/4 and 8 below, called
// here row 0 and 1; of each 8 columns the two that begin at 2·(lane % 4).

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr int KEYS = 128;      // of a step
constexpr int CHANNELS = 128;  // of a head, padded
constexpr int ROWS = 64;       // of a warpgroup; they share a scale
constexpr float BASE = 12582912.0f;  // 1.5·2²³
// Up to here the exponent's offset, BASE times it, is exact to a hundredth.
constexpr float MOST_FACTOR = 0.0078125f;
constexpr int LOWEST = 0xff800000;   // minus infinity; below every score as an integer, too
// What 384 threads may share of a multiprocessor's registers.
constexpr int COPY_REGISTERS = 24, COMPUTE_REGISTERS = 240;
constexpr bool FP8 = V_FORMAT == 0;  // 0: e4m3, 1: bfloat16, 2: float16
constexpr float LOG2_P_MAX = FP8 ? 8.807354922057604f : 0.0f;  // P's largest is e4m3's, 448
constexpr float P_MAX = FP8 ? 448.0f : 1.0f;

constexpr int K_BYTES = KEYS * CHANNELS;
// In FP8 a channel of ones follows V's: its products are the sums of P's rows.
constexpr int ONES_BYTES = FP8 ? 8 * KEYS : 0;
constexpr int V_BYTES = KEYS * CHANNELS * (FP8 ? 1 : 2);
constexpr int Q_BYTES = ROWS * CHANNELS;
constexpr int SUMS = FP8 ? 68 : 64;  // accumulators of P·V a thread
// The FP8 product adds in 14 bits: after so many steps its sums go to the output, in float32.
constexpr int STEPS_OF_SUMS = 4;
// Where P's products begin with half of the keys, while the other half's exponentials are made.
constexpr bool IN_HALVES = !FP8;
// So far below a row's maximum P is under 2⁻¹⁰, half of the least of e4m3, and so rounded to zero.
constexpr float NOTHING = 10.01f + LOG2_P_MAX;
// Whether P is zero is looked at in each fourth step, and in so many after one where it was.
constexpr int PATIENCE = 8;

struct __align__(1024) Shared {
    char q[WARPGROUPS][Q_BYTES];
    char k[STAGES][K_BYTES];
    char v[STAGES][V_BYTES + ONES_BYTES];
    int4 start[STAGES][WARPGROUPS][KEYS / 2];  // where the scores of two keys start, twice
    float2 factor[STAGES][WARPGROUPS];  // what a score is worth, for each half of the keys
    u64 q_full, k_full[STAGES], k_free[STAGES], v_full[STAGES], v_free[STAGES];
};

static_assert(sizeof(Shared) == SHARED_BYTES, "the launcher asks for what this takes");

struct __align__(64) TensorMap {
    char bytes[128];
};

struct Arguments {
    const float *q_scale;  // [B·H, count_padded], equal within ROWS; makes powers of two
    const float *q_dots;   // [B·H, count_padded], what the log-sum-exp lacks, or null
    const float *k_scale;  // [B·Hk, keys_padded], equal within 64 keys
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
__device__ __forceinline__ u64 descriptor(const void *tile, int leading = 16) {
    // By halves, so that what is constant needs no arithmetic.
    u32 low = address(tile) >> 4 | (leading >> 4) << 16, high = 1024 >> 4 | 1 << 30;
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

__device__ __forceinline__ void copy(Shared &shared, const Arguments &a, const TensorMap &q_map,
                                     const TensorMap &k_map, const TensorMap &v_map, int head,
                                     int key_head, const Visit &visit) {
    int row = head * a.count_padded + blockIdx.x * ROWS * WARPGROUPS;
    expect(shared.q_full, WARPGROUPS * Q_BYTES);
    for (int group = 0; group < WARPGROUPS; ++group) {
        copy_tile(shared.q[group], q_map, 0, row + group * ROWS, shared.q_full);
    }
#pragma unroll 1
    for (int step = 0; step < visit.steps; ++step) {
        int stage = step % STAGES, parity = step / STAGES & 1, key = visit[step] * KEYS;
        wait(shared.k_free[stage], parity ^ 1);
        expect(shared.k_full[stage], K_BYTES);
        copy_tile(shared.k[stage], k_map, 0, key_head * a.keys_padded + key, shared.k_full[stage]);
        wait(shared.v_free[stage], parity ^ 1);
        expect(shared.v_full[stage], V_BYTES);
        if constexpr (FP8) {
            copy_tile(shared.v[stage], v_map, key, key_head * CHANNELS, shared.v_full[stage]);
        } else {
            int batch = head / a.heads, one = key_head - batch * (a.heads / a.shared);
            copy_tile(shared.v[stage], v_map, 0, key, one, batch, shared.v_full[stage]);
            copy_tile(shared.v[stage] + V_BYTES / 2, v_map, 64, key, one, batch,
                      shared.v_full[stage]);
        }
    }
}

// ---- The preparing warp ------------------------------------------------------------------------

// Where each key's scores start, and what a score is worth. Keys beyond the last start at minus
// infinity: theirs are rows of zeros, so they stay there.
__device__ __forceinline__ void prepare(Shared &shared, const Arguments &a, int head, int key_head,
                                        const Visit &visit) {
    int lane = threadIdx.x % 32;
    const float *bias = a.k_bias ? a.k_bias + i64(head) * a.keys_padded : nullptr;
    const float *k_scale = a.k_scale + i64(key_head) * a.keys_padded;
    const float *q_scale = a.q_scale + i64(head) * a.count_padded;
    for (int step = 0; step < visit.steps; ++step) {
        int stage = step % STAGES, parity = step / STAGES & 1, key = visit[step] * KEYS + lane * 4;
        float of_keys = k_scale[key];  // a lane's four keys share it
        float4 added = {0.0f, 0.0f, 0.0f, 0.0f};
        if (bias) added = *reinterpret_cast<const float4 *>(bias + key);
        wait(shared.k_free[stage], parity ^ 1);
#pragma unroll 1
        for (int group = 0; group < WARPGROUPS; ++group) {
            int row = min(int(blockIdx.x * WARPGROUPS + group) * ROWS, a.count_padded - ROWS);
            float factor = fmaxf(q_scale[row] * of_keys, 1e-37f), units = reciprocal(factor);
            int4 *start = &shared.start[stage][group][lane * 2];
            int x = key < a.keys ? __float_as_int(fmaf(added.x, units, BASE)) : LOWEST;
            int y = key + 1 < a.keys ? __float_as_int(fmaf(added.y, units, BASE)) : LOWEST;
            start[0] = {x, y, x, y};
            x = key + 2 < a.keys ? __float_as_int(fmaf(added.z, units, BASE)) : LOWEST;
            y = key + 3 < a.keys ? __float_as_int(fmaf(added.w, units, BASE)) : LOWEST;
            start[1] = {x, y, x, y};
            if (lane == 0) shared.factor[stage][group].x = factor;
            if (lane == 16) shared.factor[stage][group].y = factor;
        }
        __syncwarp();
        if (lane == 0) arrive(shared.k_full[stage]);
    }
}

// ---- The computing warpgroups ------------------------------------------------------------------

// What a thread knows of its two rows.
struct Rows {
    float highest[2];
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

__device__ __forceinline__ void issue_scores(int (&s)[64], Shared &shared, int group, int stage) {
    u64 q = descriptor(shared.q[group]), k = descriptor(shared.k[stage]);
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
__device__ __forceinline__ void issue_values(float (&t)[SUMS], const u32 *p, Shared &shared,
                                             int stage, int add) {
    u64 v = FP8 ? descriptor(shared.v[stage]) : descriptor(shared.v[stage], V_BYTES / 2);
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

// The largest of a thread's scores in each of its rows, in powers of two; `base` is what the scores
// hold too much afterwards.
__device__ __forceinline__ void find_largest(int (&s)[64], const float2 factor, float &base,
                                             float (&largest)[2]) {
    int most[2][2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int first = half * 32 + row * 2;
            most[row][half] = max(s[first], s[first + 1]);
#pragma unroll
            for (int i = first + 4; i < first + 32; i += 4) {
                most[row][half] = max(max(s[i], s[i + 1]), most[row][half]);
            }
        }
        largest[row] = fmaxf((__int_as_float(most[row][0]) - BASE) * factor.x,
                             (__int_as_float(most[row][1]) - BASE) * factor.y);
    }
    // Scores worth so much that the exponent's offset would be rounded: the base is taken off here.
    base = BASE;
    if (fmaxf(factor.x, factor.y) > MOST_FACTOR) {
        asm volatile("" ::: "memory");  // keeps it a branch
        base = 0.0f;
#pragma unroll
        for (int i = 0; i < 64; ++i) s[i] = __float_as_int(__int_as_float(s[i]) - BASE);
    }
}

// New maxima of the rows, and what is left of the sums that were taken with the old ones.
__device__ __forceinline__ void raise(float (&largest)[2], Rows &rows, float (&sums)[SUMS]) {
    float rescale[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) largest[row] = fmaxf(largest[row], rows.highest[row]);
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
        rescale[row] = exp2_of(rows.highest[row] - largest[row]);
        rows.highest[row] = largest[row];
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
// put all of them last, and await each; so each eight keys wait, by their data, for exponentials
// that were begun earlier.
template <int BEGIN, int END>
__device__ __forceinline__ void exponentials(int (&s)[64], u32 *p, float (&offset)[2][2],
                                             const float2 factor, Rows &rows, const int4 *starts,
                                             int zero) {
    float last[2], earlier[2];
#pragma unroll
    for (int i = BEGIN; i < END; i += 8) {
        int half = i / 32;
        if (FP8 && i > BEGIN) {
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                offset[row][half] = after(offset[row][half], earlier[row], zero);
            }
        }
        float e[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            float score = __int_as_float(s[i + j]);
            e[j] = exp2_of(fmaf(score, half ? factor.y : factor.x, offset[j / 2 % 2][half]));
        }
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            earlier[row] = i > BEGIN ? last[row] : 0.0f;
            last[row] = e[4 + row * 2];
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
    __syncwarp();
    if (lane == 0) arrive(barrier);
}

__device__ __forceinline__ void store(const float (&o)[64], Rows &rows, const Arguments &a,
                                      int head, int key_head, int first) {
    int row_in_block = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        float total = sum_across_row(rows.total[row]);
        int n = first + row_in_block + row * 8;
        if (n >= a.count) continue;
        float scale = total > 0.0f ? 1.0f / total : 0.0f;
        bool narrow = FP8 && a.out_scale;
        if (narrow) scale /= a.out_scale[head / a.heads];
        i64 base = i64(head / a.heads) * a.o_b + i64(head % a.heads) * a.o_h + i64(n) * a.o_n;
        unsigned short *out = static_cast<unsigned short *>(a.out) + base;
        const float *of_channel = FP8 ? a.v_scale + key_head * CHANNELS : nullptr;
#pragma unroll
        for (int i = 0; i < 64; i += 4) {
            int channel = i * 2 + threadIdx.x % 4 * 2;
            if (channel >= a.size) continue;
            float x = o[i + row * 2] * scale, y = o[i + row * 2 + 1] * scale;
            if constexpr (FP8) {
                x *= of_channel[channel];
                y *= of_channel[channel + 1];
            }
            if (narrow) {
                char *place = static_cast<char *>(a.out) + base + channel;
                *reinterpret_cast<unsigned short *>(place) = two_e4m3(x, y);
                continue;
            }
            u32 packed = two_of(x, y, a.out_is_half);
            out[channel * a.o_d] = packed & 0xffff;
            out[(channel + 1) * a.o_d] = packed >> 16;
        }
        if (a.lse && threadIdx.x % 4 == 0) {
            float removed = a.q_dots[i64(head) * a.count_padded + n];
            float value = (rows.highest[row] + log2_of(total / P_MAX)) * 0.6931471805599453f;
            a.lse[i64(head) * a.count + n] = value + removed;
        }
    }
}

__device__ __forceinline__ void compute(Shared &shared, const Arguments &a, int head, int key_head,
                                        const Visit &visit) {
    // By a shuffle, or the assembler would read the slow register of the thread's number anew, and
    // would not know that a warp's group is one.
    int group = threadIdx.x / 128 - 1, lane = threadIdx.x % 32;
    group = __shfl_sync(~0u, group, 0);
    lane = __shfl_sync(~0u, lane, lane);
    int first_row = (blockIdx.x * WARPGROUPS + group) * ROWS;
    Rows rows;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        rows.highest[row] = __int_as_float(LOWEST);
        rows.total[row] = 0.0f;
        rows.kept[row] = 1.0f;
    }
    int s[64];
#if V_FORMAT == 0
    float o[64] = {}, t[SUMS] = {};
#else
    float o[64] = {}, (&t)[64] = o;  // 16-bit products add exactly enough to stay in the output
#endif
    u32 p[FP8 ? 16 : 32];
    float offset[2][2];
    const int4 *first_start = &shared.start[0][group][lane % 4];
    wait(shared.q_full, 0);
    if (!visit.steps) return store(o, rows, a, head, key_head, first_row);
    wait(shared.k_full[0], 0);
#pragma unroll
    for (int i = 0; i < 16; ++i) start_scores(s + i * 4, first_start, i);
    float2 factor = shared.factor[0][group];
    issue_scores(s, shared, group, 0);
    wait_products<0>();
    int stage = 0, parity = 0;
    [[maybe_unused]] int patience = 0;
    int held = 0;  // whether there are sums that the output has not taken in
    for (int step = 0; step < visit.steps; ++step) {
        int next = stage + 1 == STAGES ? 0 : stage + 1, next_parity = parity ^ (next == 0);
        bool k_there = over(shared.k_full[next], next_parity);
        bool v_there = over(shared.v_full[stage], parity);
        pin(s);
        release(shared.k_free[stage], lane);
        float largest[2], base;
        bool counts = true, any_counts = true;  // of the warp, of the warpgroup
        find_largest(s, factor, base, largest);
#if V_FORMAT == 0
        if (patience || step % STEPS_OF_SUMS == 0) {
            counts = __any_sync(~0u, largest[0] > rows.highest[0] - NOTHING ||
                                         largest[1] > rows.highest[1] - NOTHING);
            any_counts = any_of_warpgroup(counts, group);
            patience = any_counts ? max(patience - 1, 0) : PATIENCE;
        }
#endif
        wait_products<0>();
        pin(t);
        if (step) release(shared.v_free[stage ? stage - 1 : STAGES - 1], lane);
        if (__any_sync(~0u, largest[0] > rows.highest[0] || largest[1] > rows.highest[1])) {
            raise(largest, rows, t);
        }
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            float least = LOG2_P_MAX - rows.highest[row];
            offset[row][0] = fmaf(-base, factor.x, least);
            offset[row][1] = fmaf(-base, factor.y, least);
        }
#if V_FORMAT == 0
        if (step % STEPS_OF_SUMS == 0 && held) {
            asm volatile("" ::: "memory");
            take_in(o, t, rows);
            held = 0;
        }
#endif
        if (step + 1 < visit.steps && !k_there) wait(shared.k_full[next], next_parity);
        float2 following = shared.factor[next][group];
        const int4 *starts = first_start + next * (WARPGROUPS * KEYS / 2);
        if (!v_there) wait(shared.v_full[stage], parity);
        if (counts) {
            exponentials<0, IN_HALVES ? 32 : 64>(s, p, offset, factor, rows, starts, a.zero);
        } else {
#pragma unroll
            for (int i = 0; i < 16; ++i) start_scores(s + i * 4, starts, i);
#pragma unroll
            for (int i = 0; i < 16; ++i) p[i] = 0;
        }
        if (IN_HALVES) {
            issue_values<0, 2>(t, p, shared, stage, 1);
            exponentials<32, 64>(s, p, offset, factor, rows, starts, a.zero);
        }
        factor = following;
        // After the last step these are products of stale bytes, which nothing reads.
        issue_scores(s, shared, group, next);
        if (any_counts) {
            issue_values<IN_HALVES ? 2 : 0, 4>(t, p, shared, stage, held);
            held = 1;
            wait_products<1>();
        } else {
            wait_products<0>();
        }
        stage = next;
        parity = next_parity;
    }
    wait_products<0>();
    pin(t);
#if V_FORMAT == 0
    if (held) take_in(o, t, rows);  // else no maximum has risen since
#endif
    store(o, rows, a, head, key_head, first_row);
}

extern "C" __global__ void __launch_bounds__((WARPGROUPS + 1) * 128, 1)
    attention(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
              const __grid_constant__ TensorMap v_map, const Arguments a) {
    extern __shared__ __align__(1024) char memory[];
    Shared &shared = *reinterpret_cast<Shared *>(memory);
    int head = blockIdx.y, key_head = head / a.shared;
    if (threadIdx.x == 0) {
        start_barrier(shared.q_full, 1);
        for (int stage = 0; stage < STAGES; ++stage) {
            start_barrier(shared.k_full[stage], 2);
            start_barrier(shared.v_full[stage], 1);
            start_barrier(shared.k_free[stage], WARPGROUPS * 4);
            start_barrier(shared.v_free[stage], WARPGROUPS * 4);
        }
    }
    if (FP8) {
        for (int i = threadIdx.x; i < STAGES * ONES_BYTES / 4; i += blockDim.x) {
            int stage = i / (8 * KEYS / 4), place = i % (8 * KEYS / 4);
            int *ones = reinterpret_cast<int *>(shared.v[stage] + V_BYTES);
            ones[place] = place < KEYS / 4 ? 0x38383838 : 0;  // a row of ones, seven of zeros
        }
    }
    show_writes();
    __syncthreads();
    Visit visit(a, head, blockIdx.x);
    if (threadIdx.x < 128) {
        give_registers<COPY_REGISTERS>();
        if (threadIdx.x >= 32 && threadIdx.x < 64) prepare(shared, a, head, key_head, visit);
        if (threadIdx.x == 0) copy(shared, a, q_map, k_map, v_map, head, key_head, visit);
    } else {
        take_registers<COMPUTE_REGISTERS>();
        compute(shared, a, head, key_head, visit);
    }
}
