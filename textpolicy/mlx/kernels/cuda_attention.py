"""The CUDA source of attention in cuda.py, which documents it. Names in capitals are constants of a kernel."""

from __future__ import annotations

from .cuda_source import LOAD

# What U slots add to the queries of G heads that share them: a softmax as it goes (online, arXiv:1805.02867).
ABSORB = (
    LOAD
    + """
template <typename T, int LANES, int G, int U> __device__ void absorb(
    const Pack<T, 8> (&keys)[U], const Pack<T, 8> (&values)[U], const bool (&live)[U],
    const float (&q)[G][8], float (&sum)[G][8], float (&most)[G], float (&total)[G]) {
  float k[U][8], v[U][8];
  #pragma unroll
  for (int u = 0; u < U; u++)
    #pragma unroll
    for (int i = 0; i < 8; i++) { k[u][i] = keys[u][i]; v[u][i] = values[u][i]; }
  #pragma unroll
  for (int g = 0; g < G; g++) {
    float score[U], top = most[g];
    #pragma unroll
    for (int u = 0; u < U; u++) {
      float dot = 0;
      #pragma unroll
      for (int i = 0; i < 8; i++) dot += q[g][i] * k[u][i];
      #pragma unroll
      for (int d = LANES / 2; d > 0; d /= 2) dot += __shfl_xor_sync(0xffffffff, dot, d);
      score[u] = live[u] ? dot : -INFINITY;
      top = fmaxf(top, score[u]);
    }
    const float at = top > -INFINITY ? top : 0.f, keep = exp2f(most[g] - at);
    total[g] *= keep;
    #pragma unroll
    for (int u = 0; u < U; u++) { score[u] = exp2f(score[u] - at); total[g] += score[u]; }
    #pragma unroll
    for (int i = 0; i < 8; i++) {
      float value = sum[g][i] * keep;
      #pragma unroll
      for (int u = 0; u < U; u++) value += score[u] * v[u][i];
      sum[g][i] = value;
    }
    most[g] = top;
  }
}
"""
)

# A block of threads has TILE rows and G heads that share their keys. LANES lanes hold one key at a time, eight numbers
# each; every team of so many lanes walks through its share of the slots with a softmax of its own, and in the end the
# teams' sums are joined. A prompt's slots are read once for all rows of the block if they continue the same one.
# The arriving key and value are read from where they come and written to their slot in place.
ATTEND = """
  constexpr int LANES = D / 8, TEAMS = THREADS / LANES;
  const int lane = threadIdx.x % LANES, team = threadIdx.x / LANES;
  const int head = blockIdx.x * G, kv = head / PER_KV, first = blockIdx.y * TILE;
  const int rows = queries_shape[0], prefix = prefix_keys_shape[2], capacity = keys_shape[2], heads = keys_shape[1];
  const int stride = prefix + capacity, newest = last[0];

  size_t shared_at[TILE], own_at[TILE], fresh_at[TILE];
  const bool* visible[TILE];
  bool alike = true;
  float q[TILE][G][8], sum[TILE][G][8], most[TILE][G], total[TILE][G];
  #pragma unroll
  for (int t = 0; t < TILE; t++) {
    const size_t row = min(first + t, rows - 1);
    alike = alike && parents[row] == parents[first];
    shared_at[t] = (size_t(parents[row]) * heads + kv) * prefix * D + lane * 8;
    own_at[t] = (row * heads + kv) * capacity * D + lane * 8;
    fresh_at[t] = (row * heads + kv) * D + lane * 8;
    visible[t] = seen + row * stride;
    #pragma unroll
    for (int g = 0; g < G; g++) {
      Pack<T, 8> part;
      part.load(queries + (row * HEADS + head + g) * D + lane * 8);
      most[t][g] = -INFINITY;
      total[t][g] = 0;
      #pragma unroll
      for (int i = 0; i < 8; i++) { q[t][g][i] = part[i] * SCALE * 1.4426950408889634f; sum[t][g][i] = 0; }
    }
    if (team == t && head % PER_KV == 0 && first + t < rows) {
      Pack<T, 8> part;
      part.load(fresh_keys + fresh_at[t]);
      part.store(const_cast<T*>(keys) + own_at[t] + size_t(newest) * D);
      part.load(fresh_values + fresh_at[t]);
      part.store(const_cast<T*>(values) + own_at[t] + size_t(newest) * D);
    }
  }
  // The loops below are the same for all lanes of a warp, which exchange sums.
  if (alike) {
    for (int begin = 0; begin < prefix; begin += 2 * TEAMS) {
      Pack<T, 8> k[2], v[2];
      bool live[TILE][2];
      #pragma unroll
      for (int u = 0; u < 2; u++) {
        const int slot = begin + u * TEAMS + team, safe = min(slot, prefix - 1);
        k[u].load(prefix_keys + shared_at[0] + size_t(safe) * D);
        v[u].load(prefix_values + shared_at[0] + size_t(safe) * D);
        #pragma unroll
        for (int t = 0; t < TILE; t++) live[t][u] = slot < prefix && visible[t][safe];
      }
      #pragma unroll
      for (int t = 0; t < TILE; t++) absorb<T, LANES, G, 2>(k, v, live[t], q[t], sum[t], most[t], total[t]);
    }
  } else {
    #pragma unroll
    for (int t = 0; t < TILE; t++) {
      for (int begin = 0; begin < prefix; begin += 2 * TEAMS) {
        Pack<T, 8> k[2], v[2];
        bool live[2];
        #pragma unroll
        for (int u = 0; u < 2; u++) {
          const int slot = begin + u * TEAMS + team, safe = min(slot, prefix - 1);
          k[u].load(prefix_keys + shared_at[t] + size_t(safe) * D);
          v[u].load(prefix_values + shared_at[t] + size_t(safe) * D);
          live[u] = slot < prefix && visible[t][safe];
        }
        absorb<T, LANES, G, 2>(k, v, live, q[t], sum[t], most[t], total[t]);
      }
    }
  }
  for (int begin = 0; begin <= newest; begin += TEAMS) {
    Pack<T, 8> k[TILE][1], v[TILE][1];
    bool live[TILE][1];
    const int slot = begin + team;
    #pragma unroll
    for (int t = 0; t < TILE; t++) {
      const bool old = slot < newest;
      k[t][0].load(old ? keys + own_at[t] + size_t(slot) * D : fresh_keys + fresh_at[t]);
      v[t][0].load(old ? values + own_at[t] + size_t(slot) * D : fresh_values + fresh_at[t]);
      live[t][0] = slot <= newest && visible[t][prefix + min(slot, newest)];
    }
    #pragma unroll
    for (int t = 0; t < TILE; t++) absorb<T, LANES, G, 1>(k[t], v[t], live[t], q[t], sum[t], most[t], total[t]);
  }
  // Teams of a warp join by exchange, warps through shared memory.
  constexpr int WARPS = THREADS / 32, ALL = TILE * G;
  __shared__ float tops[WARPS][ALL], totals[WARPS][ALL], sums[WARPS][ALL][D];
  #pragma unroll
  for (int t = 0; t < TILE; t++) {
    #pragma unroll
    for (int g = 0; g < G; g++) {
      #pragma unroll
      for (int d = LANES; d < 32; d *= 2) {
        const float other = __shfl_xor_sync(0xffffffff, most[t][g], d), top = fmaxf(most[t][g], other);
        const float mine = most[t][g] > -INFINITY ? exp2f(most[t][g] - top) : 0.f;
        const float theirs = other > -INFINITY ? exp2f(other - top) : 0.f;
        total[t][g] = total[t][g] * mine + __shfl_xor_sync(0xffffffff, total[t][g], d) * theirs;
        #pragma unroll
        for (int i = 0; i < 8; i++)
          sum[t][g][i] = sum[t][g][i] * mine + __shfl_xor_sync(0xffffffff, sum[t][g][i], d) * theirs;
        most[t][g] = top;
      }
      if (threadIdx.x % 32 < LANES) {
        const int warp = threadIdx.x / 32;
        if (lane == 0) { tops[warp][t * G + g] = most[t][g]; totals[warp][t * G + g] = total[t][g]; }
        #pragma unroll
        for (int i = 0; i < 8; i++) sums[warp][t * G + g][lane * 8 + i] = sum[t][g][i];
      }
    }
  }
  __syncthreads();
  for (int j = threadIdx.x; j < ALL * D; j += THREADS) {
    const int which = j / D, d = j % D, row = first + which / G;
    float top = -INFINITY, weight = 0, value = 0;
    for (int w = 0; w < WARPS; w++) top = fmaxf(top, tops[w][which]);
    for (int w = 0; w < WARPS && top > -INFINITY; w++) {
      const float part = exp2f(tops[w][which] - top);
      weight += part * totals[w][which];
      value += part * sums[w][which][d];
    }
    if (row < rows)
      out[(size_t(row) * HEADS + head + which % G) * D + d] = static_cast<T>(weight > 0 ? value / weight : 0.f);
  }
"""

# What 16 slots add to 8 queries on tensor cores (FlashAttention-2, arXiv:2307.08691): scores are keys x queries, sums
# numbers of values x queries. A lane has 16 bytes of each row that it loads; products take the numbers of a row in the
# order in which lanes have them, the same for keys and queries. A probability is the sum of two of T, and so exact to
# 16 bits or more.
PRODUCTS = """
#undef __global__
#define __global__ __attribute__((global)) __launch_bounds__(256, 2)  // two blocks fit a multiprocessor's registers
__device__ void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                         const __nv_bfloat16*) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ void multiply(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                         const __half*) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <typename T> __device__ uint32_t pair(T low, T high) {
  const T both[2] = {low, high};
  return *reinterpret_cast<const uint32_t*>(both);
}
__device__ uint32_t turned(uint32_t rows) {  // an 8 x 8 matrix of 16-bit numbers, transposed
  uint32_t columns;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(columns) : "r"(rows));
  return columns;
}
template <typename T, int D> struct Queries {  // eight of them; a lane has scores and sums of 2 (lane % 4) + 0, 1
  uint4 q[D / 32];
  float sum[D / 16][4], most[2], total[2], scale;
  __device__ void begin(const T* query, float by) {  // of lane / 4, from the lane's first number on, or null
    scale = by;
    #pragma unroll
    for (int c = 0; c < D / 32; c++)
      q[c] = query ? *reinterpret_cast<const uint4*>(query + c * 32) : make_uint4(0, 0, 0, 0);
    #pragma unroll
    for (int m = 0; m < D / 16; m++)
      #pragma unroll
      for (int i = 0; i < 4; i++) sum[m][i] = 0;
    most[0] = most[1] = -INFINITY;
    total[0] = total[1] = 0;
  }
  __device__ void absorb(const uint4 (&k)[2][D / 32], const uint4 (&v)[4][D / 64], const bool (&live)[4]) {
    float score[4] = {0, 0, 0, 0}, other[4] = {0, 0, 0, 0};
    #pragma unroll
    for (int c = 0; c < D / 32; c++) {
      const uint4 a = k[0][c], b = k[1][c];
      multiply(score, a.x, b.x, a.y, b.y, q[c].x, q[c].y, (const T*)nullptr);
      multiply(other, a.z, b.z, a.w, b.w, q[c].z, q[c].w, (const T*)nullptr);
    }
    float keep[2];
    #pragma unroll
    for (int i = 0; i < 4; i++) score[i] = live[i] ? (score[i] + other[i]) * scale : -INFINITY;
    #pragma unroll
    for (int e = 0; e < 2; e++) {
      float top = fmaxf(score[e], score[2 + e]);
      #pragma unroll
      for (int d = 4; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, d));
      top = fmaxf(top, most[e]);
      const float at = top > -INFINITY ? top : 0.f;
      keep[e] = exp2f(most[e] - at);
      score[e] = exp2f(score[e] - at);
      score[2 + e] = exp2f(score[2 + e] - at);
      total[e] = total[e] * keep[e] + score[e] + score[2 + e];
      most[e] = top;
    }
    uint32_t high[2], low[2];
    #pragma unroll
    for (int h = 0; h < 2; h++) {
      const T x = static_cast<T>(score[2 * h]), y = static_cast<T>(score[2 * h + 1]);
      high[h] = turned(pair(x, y));
      low[h] = turned(pair(static_cast<T>(score[2 * h] - static_cast<float>(x)),
                           static_cast<T>(score[2 * h + 1] - static_cast<float>(y))));
    }
    #pragma unroll
    for (int c = 0; c < D / 64; c++) {
      const uint32_t* words[4];
      #pragma unroll
      for (int r = 0; r < 4; r++) words[r] = reinterpret_cast<const uint32_t*>(&v[r][c]);
      #pragma unroll
      for (int u = 0; u < 4; u++) {
        float (&to)[4] = sum[4 * c + u];
        #pragma unroll
        for (int i = 0; i < 4; i++) to[i] *= keep[i % 2];
        const uint32_t a0 = __byte_perm(words[0][u], words[1][u], 0x5410);
        const uint32_t a1 = __byte_perm(words[0][u], words[1][u], 0x7632);
        const uint32_t a2 = __byte_perm(words[2][u], words[3][u], 0x5410);
        const uint32_t a3 = __byte_perm(words[2][u], words[3][u], 0x7632);
        multiply(to, a0, a1, a2, a3, high[0], high[1], (const T*)nullptr);
        multiply(to, a0, a1, a2, a3, low[0], low[1], (const T*)nullptr);
      }
    }
  }
  __device__ void walk(const T* keys, const T* values, const bool* const (&visible)[2], int begin, int end, int step) {
    const int near = threadIdx.x % 32 / 4, far = threadIdx.x % 4;
    for (; begin < end; begin += step) {
      uint4 k[2][D / 32], v[4][D / 64];
      #pragma unroll
      for (int r = 0; r < 2; r++)
        #pragma unroll
        for (int c = 0; c < D / 32; c++)
          k[r][c] = *reinterpret_cast<const uint4*>(keys + min(begin + near + 8 * r, end - 1) * D + c * 32 + far * 8);
      #pragma unroll
      for (int r = 0; r < 4; r++)
        #pragma unroll
        for (int c = 0; c < D / 64; c++)
          v[r][c] = *reinterpret_cast<const uint4*>(
              values + min(begin + 2 * far + r % 2 + r / 2 * 8, end - 1) * D + c * 64 + near * 8);
      bool live[4];
      #pragma unroll
      for (int i = 0; i < 4; i++) {
        const int slot = begin + near + i / 2 * 8;
        live[i] = slot < end && visible[i % 2][min(slot, end - 1)];
      }
      absorb(k, v, live);
    }
  }
  __device__ void finish(int e) {  // lanes have had different slots
    #pragma unroll
    for (int d = 4; d < 32; d *= 2) total[e] += __shfl_xor_sync(0xffffffff, total[e], d);
  }
};
"""

# A block of eight warps has eight rows, and G heads of each that share their keys. First the slots of prompts, for
# tiles of 8 / G rows that continue the same one, several warps a tile; then each warp has one row's own slots. Parts
# are joined through shared memory. The arriving key and value are written to their slot in place.
ATTEND_MANY = """
  constexpr int EACH = 8 / G, TILES = 8 / EACH, SHARES = 8 / TILES;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, near = lane / 4, far = lane % 4;
  const int head = blockIdx.x * G, kv = head / PER_KV, first = blockIdx.y * 8;
  const int rows = queries_shape[0], prefix = prefix_keys_shape[2], capacity = keys_shape[2], heads = keys_shape[1];
  const int stride = prefix + capacity, newest = last[0];
  const float scale = SCALE * 1.4426950408889634f;
  __shared__ float sums[8][8][D + 4], tops[8][8], totals[8][8];
  const auto alike = [&](int tile) {
    for (int r = 1; r < EACH; r++)
      if (parents[min(tile + r, rows - 1)] != parents[min(tile, rows - 1)]) return false;
    return true;
  };
  const auto query = [&](int row, int which) {
    return row < rows ? queries + (size_t(row) * HEADS + head + which) * D + far * 8 : nullptr;
  };
  Queries<T, D> here;

  const int tile = first + warp % TILES * EACH;
  here.begin(near < EACH * G ? query(tile + near / G, near % G) : nullptr, scale);
  if (alike(tile)) {
    const size_t at = (size_t(parents[min(tile, rows - 1)]) * heads + kv) * prefix * D;
    const bool* visible[2];
    #pragma unroll
    for (int e = 0; e < 2; e++) visible[e] = seen + size_t(min(tile + (2 * far + e) / G, rows - 1)) * stride;
    here.walk(prefix_keys + at, prefix_values + at, visible, warp / TILES * 16, prefix, SHARES * 16);
  }
  #pragma unroll
  for (int e = 0; e < 2; e++) {
    here.finish(e);
    if (near == 0) { tops[warp][2 * far + e] = here.most[e]; totals[warp][2 * far + e] = here.total[e]; }
    #pragma unroll
    for (int m = 0; m < D / 16; m++)
      *reinterpret_cast<float2*>(&sums[warp][2 * far + e][m / 4 * 64 + near * 8 + m % 4 * 2]) =
          make_float2(here.sum[m][e], here.sum[m][2 + e]);
  }
  __syncthreads();

  const int row = first + warp;
  if (row >= rows) return;
  const bool joined = alike(first + warp / EACH * EACH);
  const size_t fresh_at = (size_t(row) * heads + kv) * D;
  T* const own_keys = const_cast<T*>(keys) + fresh_at * capacity;
  T* const own_values = const_cast<T*>(values) + fresh_at * capacity;
  if (lane < D / 8) {  // every group of heads writes the same
    reinterpret_cast<uint4*>(own_keys + newest * D)[lane] = reinterpret_cast<const uint4*>(fresh_keys + fresh_at)[lane];
    reinterpret_cast<uint4*>(own_values + newest * D)[lane] =
        reinterpret_cast<const uint4*>(fresh_values + fresh_at)[lane];
  }
  __syncwarp();
  const bool* const visible[2] = {seen + size_t(row) * stride, seen + size_t(row) * stride};
  here.begin(near < G ? query(row, near) : nullptr, scale);
  if (!joined) {
    const size_t at = (size_t(parents[row]) * heads + kv) * prefix * D;
    here.walk(prefix_keys + at, prefix_values + at, visible, 0, prefix, 16);
  }
  const bool* const own_visible[2] = {visible[0] + prefix, visible[0] + prefix};
  here.walk(own_keys, own_values, own_visible, 0, newest + 1, 16);
  #pragma unroll
  for (int e = 0; e < 2; e++) {
    here.finish(e);
    const int which = 2 * far + e, column = warp % EACH * G + which;
    if (which >= G) continue;
    if (joined)
      for (int from = warp / EACH; from < 8; from += TILES) {
        const float top = fmaxf(here.most[e], tops[from][column]), at = top > -INFINITY ? top : 0.f;
        const float keep = exp2f(here.most[e] - at), add = exp2f(tops[from][column] - at);
        here.most[e] = top;
        here.total[e] = here.total[e] * keep + totals[from][column] * add;
        #pragma unroll
        for (int m = 0; m < D / 16; m++) {
          const float2 x = *reinterpret_cast<const float2*>(&sums[from][column][m / 4 * 64 + near * 8 + m % 4 * 2]);
          here.sum[m][e] = here.sum[m][e] * keep + x.x * add;
          here.sum[m][2 + e] = here.sum[m][2 + e] * keep + x.y * add;
        }
      }
    const float shrink = here.total[e] > 0 ? 1 / here.total[e] : 0.f;
    #pragma unroll
    for (int m = 0; m < D / 16; m++)
      *reinterpret_cast<uint32_t*>(out + (size_t(row) * HEADS + head + which) * D + m / 4 * 64 + near * 8 + m % 4 * 2) =
          pair(static_cast<T>(here.sum[m][e] * shrink), static_cast<T>(here.sum[m][2 + e] * shrink));
  }
"""
