// Q or K as INT8 for the attention of hopper_attention.cu: normalised, turned, smoothed, rotated.
//
// A block takes 64 tokens, which share a scale, and some heads one after the other. Four threads
// hold the 128 channels of a row: thread q has the channels 32·k + 8·q + j, so that each of its
// loads is 16 bytes and four neighbours read 64 in a row. The rotation is the signs and the
// Hadamard matrix of prepare.py, computed as seven steps of sums and differences: over the bits of
// j and k within a thread, over those of q between neighbours.

typedef unsigned int u32;
typedef long long i64;

constexpr int ROWS = 64, CHANNELS = 128, WARPS = 8;
constexpr float ROUND = 12582912.0f;             // 1.5·2²³: its low byte is the nearest integer
constexpr float ROOT = 0.08838834764831845f;     // 128**-0.5

struct Arguments {
    const void *x;         // [B, N, H, D], 16 bit, D contiguous
    const float *factors;  // [B·N], 1 / root mean square of the row; these four only if NORM
    const float *weight;   // [H·D]
    const float *cos, *sin;  // [N, D], every angle written twice
    const float *minus;    // [B·H, D], the mean of what comes after norm and rotary positions
    const float *other;    // [B·H, D], or null: the rows' dots with it are wanted
    const float *lowest;   // [B·H], the least that a scale may be, or null
    signed char *data;     // [B·H, N', D]
    float *scales;         // [B·H, N']
    float *dots;           // [B·H, N'], or null
    i64 x_b, x_n, x_h;
    float factor, dot_factor;
    int heads, group, groups, count, padded, smooth_dots;
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

// Eight floats of this thread in each quarter of a row of 128.
__device__ __forceinline__ void load_row(float (&to)[32], const float *row, int q) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float4 v = *reinterpret_cast<const float4 *>(row + 32 * k + 8 * q + 4 * half);
            int i = 8 * k + 4 * half;
            to[i] = v.x, to[i + 1] = v.y, to[i + 2] = v.z, to[i + 3] = v.w;
        }
    }
}

__device__ __forceinline__ void load_values(uint4 (&raw)[4], const char *row, bool inside) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
        raw[k] = inside ? *reinterpret_cast<const uint4 *>(row + 64 * k) : make_uint4(0, 0, 0, 0);
}

__device__ __forceinline__ void unpack(float (&v)[32], const uint4 (&raw)[4]) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        u32 words[4] = {raw[k].x, raw[k].y, raw[k].z, raw[k].w};
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            float2 both = pair_of(words[w]);
            v[8 * k + 2 * w] = both.x, v[8 * k + 2 * w + 1] = both.y;
        }
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

__device__ __forceinline__ void rotate(float (&v)[32], int q) {
    // The sign of channel c is the parity of c₀c₁ + c₂c₃ + c₄c₅; c₃ and c₄ are q's, c₅ is k's.
    float by_q0 = q & 1 ? -1.0f : 1.0f, by_q1 = q & 2 ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        if ((i & 3) == 3) v[i] = -v[i];
        if (i & 4) v[i] *= by_q0;
        if (i & 8) v[i] *= by_q1;
    }
    within<1>(v), within<2>(v), within<4>(v), within<8>(v), within<16>(v);
#pragma unroll
    for (int i = 0; i < 32; ++i) v[i] = fmaf(v[i], by_q0, __shfl_xor_sync(~0u, v[i], 1));
#pragma unroll
    for (int i = 0; i < 32; ++i) v[i] = fmaf(v[i], by_q1, __shfl_xor_sync(~0u, v[i], 2));
}

__device__ __forceinline__ u32 bytes_of(float a, float b, float c, float d) {
    u32 low = __byte_perm(__float_as_uint(a), __float_as_uint(b), 0x0040);
    u32 high = __byte_perm(__float_as_uint(c), __float_as_uint(d), 0x0040);
    return __byte_perm(low, high, 0x5410);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 2)
    prepare(const __grid_constant__ Arguments a) {
    __shared__ float tops[2][WARPS];
    int row = threadIdx.x >> 2, q = threadIdx.x & 3, warp = threadIdx.x >> 5;
    int token = blockIdx.x * ROWS + row;
    int batch = blockIdx.y / a.groups, first = blockIdx.y % a.groups * a.group;
    int last = min(first + a.group, a.heads);
    bool inside = token < a.count;
    const char *x = static_cast<const char *>(a.x) +
                    2 * (batch * a.x_b + (inside ? token : 0) * a.x_n + 8 * q);
#if NORM
    float factor = inside ? a.factors[i64(batch) * a.count + token] : 0.0f;
    float turn_cos[16], turn_sin[16];
    {
        float all[32];
        i64 place = i64(inside ? token : 0) * CHANNELS;
        load_row(all, a.cos + place, q);
#pragma unroll
        for (int i = 0; i < 16; ++i) turn_cos[i] = all[2 * i];
        load_row(all, a.sin + place, q);
#pragma unroll
        for (int i = 0; i < 16; ++i) turn_sin[i] = all[2 * i + 1];
    }
#endif
    uint4 raw[4];
    load_values(raw, x + 2 * (first * a.x_h), inside);
    for (int head = first; head < last; ++head) {
        float v[32], vector[32];
        unpack(v, raw);
        if (head + 1 < last) load_values(raw, x + 2 * ((head + 1) * a.x_h), inside);
#if NORM
        load_row(vector, a.weight + head * CHANNELS, q);
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            float even = v[2 * i] * factor * vector[2 * i];
            float odd = v[2 * i + 1] * factor * vector[2 * i + 1];
            v[2 * i] = even * turn_cos[i] - odd * turn_sin[i];
            v[2 * i + 1] = even * turn_sin[i] + odd * turn_cos[i];
        }
#endif
        i64 place = i64(batch) * a.heads + head;
        load_row(vector, a.minus + place * CHANNELS, q);
        float dot = 0.0f;
        if (a.other) {
            const float *seen = a.other + place * CHANNELS + 8 * q;
            float smooth = a.smooth_dots ? 1.0f : 0.0f;
#pragma unroll
            for (int i = 0; i < 32; i += 4) {
                float4 o = *reinterpret_cast<const float4 *>(seen + 4 * (i & ~7) + (i & 7));
                dot = fmaf(fmaf(-smooth, vector[i], v[i]), o.x, dot);
                dot = fmaf(fmaf(-smooth, vector[i + 1], v[i + 1]), o.y, dot);
                dot = fmaf(fmaf(-smooth, vector[i + 2], v[i + 2]), o.z, dot);
                dot = fmaf(fmaf(-smooth, vector[i + 3], v[i + 3]), o.w, dot);
            }
            dot += __shfl_xor_sync(~0u, dot, 1);
            dot += __shfl_xor_sync(~0u, dot, 2);
        }
#pragma unroll
        for (int i = 0; i < 32; ++i) v[i] = inside ? v[i] - vector[i] : 0.0f;
        rotate(v, q);
        float top = 0.0f;
#pragma unroll
        for (int i = 0; i < 32; ++i) top = fmaxf(top, fabsf(v[i]));
#pragma unroll
        for (int lane = 16; lane; lane >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, lane));
        // Two heads' maxima take turns, so that one barrier a head is enough.
        float(&mine)[WARPS] = tops[head & 1];
        if (threadIdx.x % 32 == 0) mine[warp] = top;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < WARPS; ++i) top = fmaxf(top, mine[i]);
        // Rows of zeros, and those so small that their scale would vanish, are stored as zeros.
        float scale = fmaxf(top * (ROOT * fabsf(a.factor)), 1e-30f) / 127.0f;
        if (a.lowest) scale = fmaxf(scale, a.lowest[place]);
        float steps = ROOT * a.factor / scale;
        i64 at = place * a.padded + token;
        if (q == 0) a.scales[at] = scale;
        if (q == 0 && a.dots) a.dots[at] = inside ? dot * a.dot_factor : 0.0f;
        char *to = reinterpret_cast<char *>(a.data) + at * CHANNELS + 8 * q;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            float r[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) r[j] = fmaf(v[8 * k + j], steps, ROUND);
            uint2 packed = make_uint2(bytes_of(r[0], r[1], r[2], r[3]),
                                      bytes_of(r[4], r[5], r[6], r[7]));
            *reinterpret_cast<uint2 *>(to + 32 * k) = packed;
        }
    }
}
