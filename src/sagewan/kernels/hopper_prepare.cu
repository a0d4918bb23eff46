// Q or K as INT8 for the attention of hopper_attention.cu: normalised, turned, smoothed, rotated.
//
// A block takes 64 tokens, which share a scale, and some heads one after the other. Four threads
// hold the 128 channels of two rows, 8 apart: thread q has the channels 32·k + 8·q + j, so that
// each of its loads is 16 bytes and four neighbours read 64 in a row. The rotation is the signs and
// the Hadamard matrix of prepare.py. Of the seven bits of a channel, products of the tensor cores
// run over j's lowest two and q's, which the threads then hold as before; sums and differences
// within a thread over the other three. Values are rounded to 16 bit before, as where they are
// written between two kernels. Signs are folded into what the values are multiplied by.

typedef unsigned int u32;
typedef long long i64;

constexpr int ROWS = 64, CHANNELS = 128, WARPS = 4;
constexpr float ROUND = 12582912.0f;             // 1.5·2²³: its low byte is the nearest integer
constexpr float ROOT = 0.08838834764831845f;     // 128**-0.5

struct Arguments {
    const void *x;         // [B, N, H, D], 16 bit, D contiguous
    const float *factors;  // [B·N], 1 / root mean square of the row
    const float *weight;   // [H·D]
    const float *cos, *sin;  // [N, D], every angle written twice
    const float *minus;    // [B·H, D], the mean of what comes after norm and positions, signed
    const float *other;    // [B·H, D], signed, or null: the smoothed rows' dots with it are wanted
    const float *lowest;   // [B·H], the least that a scale may be, or null
    signed char *data;     // [B·H, N', D]
    float *scales;         // [B·H, N']
    float *dots;           // [B·H, N'], or null
    i64 x_b, x_n, x_h;
    float factor, dot_factor;
    int heads, group, groups, count, padded;
};

__device__ __forceinline__ float2 pair_of(u32 bits) {
#if HALF
    float2 values;
    asm("{\n.reg .f16 a, b;\nmov.b32 {a, b}, %2;\ncvt.f32.f16 %0, a;\ncvt.f32.f16 %1, b;\n}"
        : "=f"(values.x), "=f"(values.y)
        : "r"(bits));
    return values;
#else
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
#endif
}

__device__ __forceinline__ u32 rounded(float a, float b) {
    u32 packed;
#if HALF
    asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(packed) : "f"(a), "f"(b));
#else
    asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(packed) : "f"(a), "f"(b));
#endif
    return packed;
}

// The rows g and g + 8 of 16 channels, a[0], a[2] and a[1], a[3], times ±1.
__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if HALF
#define TYPES "f32.f16.f16.f32"
#else
#define TYPES "f32.bf16.bf16.f32"
#endif
    asm("mma.sync.aligned.m16n8k16.row.col." TYPES " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %10, %10, %10};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
#undef TYPES
}

// Eight floats of this thread in a quarter of a row of 128.
__device__ __forceinline__ void load_eight(float (&to)[8], const float *row, int k, int q) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float4 v = *reinterpret_cast<const float4 *>(row + 32 * k + 8 * q + 4 * half);
        to[4 * half] = v.x, to[4 * half + 1] = v.y, to[4 * half + 2] = v.z, to[4 * half + 3] = v.w;
    }
}

__device__ __forceinline__ void load_values(uint4 (&raw)[2][4], const char *const (&rows)[2],
                                            const bool (&inside)[2], i64 offset) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int k = 0; k < 4; ++k)
            raw[r][k] = inside[r] ? *reinterpret_cast<const uint4 *>(rows[r] + offset + 64 * k)
                                  : make_uint4(0, 0, 0, 0);
    }
}

template <int BIT> __device__ __forceinline__ void within(float (&v)[32]) {
#pragma unroll
    for (int i = 0; i < 32; ++i)
        if (!(i & BIT)) {
            float a = v[i], b = v[i | BIT];
            v[i] = a + b, v[i | BIT] = a - b;
        }
}

__device__ __forceinline__ u32 bytes_of(float a, float b, float c, float d) {
    u32 low = __byte_perm(__float_as_uint(a), __float_as_uint(b), 0x0040);
    u32 high = __byte_perm(__float_as_uint(c), __float_as_uint(d), 0x0040);
    return __byte_perm(low, high, 0x5410);
}

// The table of positions of a row, times its norm's factor and the signs that both channels of a
// pair have. The sign of channel c is the parity of c₀c₁ + c₂c₃ + c₄c₅; c₃ and c₄ are q's bits,
// c₅ is k's lowest, c₀c₁ concerns the odd channel of each second pair.
__device__ __forceinline__ void load_turn(float (&cos)[16], float (&sin)[16], const Arguments &a,
                                          i64 token, float factor, int q) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        float all[8];
        load_eight(all, a.cos + token * CHANNELS, k, q);
#pragma unroll
        for (int j = 0; j < 4; ++j) cos[4 * k + j] = all[2 * j];
        load_eight(all, a.sin + token * CHANNELS, k, q);
#pragma unroll
        for (int j = 0; j < 4; ++j) sin[4 * k + j] = all[2 * j + 1];
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        bool minus = (i & 2 && q & 1) != (i & 4 && q & 2);
        float signed_factor = minus ? -factor : factor;
        cos[i] *= signed_factor, sin[i] *= signed_factor;
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    prepare(const __grid_constant__ Arguments a) {
    __shared__ float tops[2][WARPS];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane >> 2, q = lane & 3;
    int batch = blockIdx.y / a.groups, first = blockIdx.y % a.groups * a.group;
    int last = min(first + a.group, a.heads), token = blockIdx.x * ROWS + warp * 16 + g;
    bool whole = int(blockIdx.x + 1) * ROWS <= a.count;
    bool inside[2];
    const char *rows[2];
    float turn_cos[2][16], turn_sin[2][16];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        i64 n = token + 8 * r;
        inside[r] = n < a.count;
        n = inside[r] ? n : 0;
        rows[r] = static_cast<const char *>(a.x) + 2 * (batch * a.x_b + n * a.x_n + 8 * q);
        float factor = inside[r] ? a.factors[i64(batch) * a.count + n] : 0.0f;
        load_turn(turn_cos[r], turn_sin[r], a, n, factor, q);
    }
    // Of the Hadamard matrix of 16 the rows 2q and 2q + 1, whose upper half is the same, column g.
    bool odd = __popc(2 * q & g) & 1, odd_next = __popc((2 * q + 1) & g) & 1;
    u32 plus = rounded(odd ? -1.0f : 1.0f, odd_next ? -1.0f : 1.0f), minus = plus ^ 0x80008000u;
    uint4 raw[2][4];
    load_values(raw, rows, inside, 2 * (first * a.x_h));
    for (int head = first; head < last; ++head) {
        i64 place = i64(batch) * a.heads + head;
        float v[2][32], dot[2] = {0.0f, 0.0f};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            float weight[8], mean[8], other[8];
            load_eight(weight, a.weight + head * CHANNELS, k, q);
            load_eight(mean, a.minus + place * CHANNELS, k, q);
            if (a.other) load_eight(other, a.other + place * CHANNELS, k, q);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                u32 words[4] = {raw[r][k].x, raw[r][k].y, raw[r][k].z, raw[r][k].w};
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    int i = 4 * k + j;
                    float2 both = pair_of(words[j]);
                    float even = both.x * weight[2 * j], odd_one = both.y * weight[2 * j + 1];
                    float c = turn_cos[r][i], s = turn_sin[r][i];
                    v[r][2 * i] = fmaf(even, c, fmaf(-odd_one, s, -mean[2 * j]));
                    float turned = j & 1 ? fmaf(-even, s, fmaf(-odd_one, c, -mean[2 * j + 1]))
                                         : fmaf(even, s, fmaf(odd_one, c, -mean[2 * j + 1]));
                    v[r][2 * i + 1] = turned;
                }
                if (a.other) {
#pragma unroll
                    for (int j = 0; j < 8; ++j) dot[r] = fmaf(v[r][8 * k + j], other[j], dot[r]);
                }
            }
        }
        if (head + 1 < last) load_values(raw, rows, inside, 2 * ((head + 1) * a.x_h));
        if (!whole) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                if (inside[r]) continue;
                dot[r] = 0.0f;
#pragma unroll
                for (int i = 0; i < 32; ++i) v[r][i] = 0.0f;
            }
        }
#pragma unroll
        for (int i = 0; i < 32; i += 4) {
            u32 values[4] = {rounded(v[0][i], v[0][i + 1]), rounded(v[1][i], v[1][i + 1]),
                             rounded(v[0][i + 2], v[0][i + 3]), rounded(v[1][i + 2], v[1][i + 3])};
            float low[4], high[4];
            multiply(low, values, plus, plus);
            multiply(high, values, plus, minus);
            v[0][i] = low[0], v[0][i + 1] = low[1], v[1][i] = low[2], v[1][i + 1] = low[3];
            v[0][i + 2] = high[0], v[0][i + 3] = high[1];
            v[1][i + 2] = high[2], v[1][i + 3] = high[3];
        }
        float top = 0.0f;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            within<4>(v[r]), within<8>(v[r]), within<16>(v[r]);
#pragma unroll
            for (int i = 0; i < 32; ++i) top = fmaxf(top, fabsf(v[r][i]));
        }
#pragma unroll
        for (int apart = 16; apart; apart >>= 1)
            top = fmaxf(top, __shfl_xor_sync(~0u, top, apart));
        // Two heads' maxima take turns, so that one barrier a head is enough.
        float(&mine)[WARPS] = tops[head & 1];
        if (lane == 0) mine[warp] = top;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < WARPS; ++i) top = fmaxf(top, mine[i]);
        // Rows of zeros, and those so small that their scale would vanish, are stored as zeros.
        float scale = fmaxf(top * (ROOT * fabsf(a.factor)), 1e-30f) / 127.0f;
        if (a.lowest) scale = fmaxf(scale, a.lowest[place]);
        float steps = ROOT * a.factor / scale;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            i64 at = place * a.padded + token + 8 * r;
            if (a.dots) {
                dot[r] += __shfl_xor_sync(~0u, dot[r], 1);
                dot[r] += __shfl_xor_sync(~0u, dot[r], 2);
                if (q == 0) a.dots[at] = dot[r] * a.dot_factor;
            }
            if (q == 0) a.scales[at] = scale;
            char *to = reinterpret_cast<char *>(a.data) + at * CHANNELS + 8 * q;
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                float n[8];
#pragma unroll
                for (int j = 0; j < 8; ++j) n[j] = fmaf(v[r][8 * k + j], steps, ROUND);
                uint2 packed = make_uint2(bytes_of(n[0], n[1], n[2], n[3]),
                                          bytes_of(n[4], n[5], n[6], n[7]));
                *reinterpret_cast<uint2 *>(to + 32 * k) = packed;
            }
        }
    }
}
