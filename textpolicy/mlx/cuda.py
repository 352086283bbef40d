"""CUDA kernels for decoding: attention of one query per row, drawing a token, and what stands between two products.

MLX's own attention wants a plan for every new length and leaves its fast path under a mask; its sampling
passes over the logits many times. These take the length and the mask as data and read everything once. A decoding
step is short, and most of it is the start of kernels: so LoRA, norm, rotation and residual are done in one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import mlx.core as mx
import numpy as np

_LOAD = """
template <typename T, int N> struct Pack {  // N neighbours in memory, N a multiple of 8, in loads of 16 bytes
  static constexpr int WORDS = N * sizeof(T) / 16;
  uint4 raw[WORDS];
  __device__ void load(const T* from) {
    for (int i = 0; i < WORDS; i++) raw[i] = reinterpret_cast<const uint4*>(from)[i];
  }
  __device__ void store(T* to) const {
    for (int i = 0; i < WORDS; i++) reinterpret_cast<uint4*>(to)[i] = raw[i];
  }
  __device__ void zero() { for (int i = 0; i < WORDS; i++) raw[i] = make_uint4(0, 0, 0, 0); }
  __device__ float operator[](int i) const { return static_cast<float>(reinterpret_cast<const T*>(raw)[i]); }
};
"""

# What U slots add to the queries of G heads that share them: a softmax as it goes (online, arXiv:1805.02867).
_ABSORB = (
    _LOAD
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
_ATTEND = """
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

# Every thread adds z B to eight neighbouring outputs of ROWS rows; B is (RANK, OUT), z (rows, RANK) for each layer.
_ADD_LORA = """
  constexpr int ROWS = 8;
  const int column = (blockIdx.x * blockDim.x + threadIdx.x) * 8, first = blockIdx.y * ROWS, rows = y_shape[0];
  if (column >= OUT) return;
  T* const to[] = {TARGETS};
  const int ends[] = {ENDS};
  int layer = 0;
  while (column >= ends[layer]) layer++;
  const int start = layer ? ends[layer - 1] : 0, width = ends[layer] - start;
  const T* low = y + OUT + layer * RANK;
  float sum[ROWS][8];
  for (int r = 0; r < ROWS; r++) {
    Pack<T, 8> part;
    part.zero();
    if (first + r < rows) part.load(y + size_t(first + r) * WIDE + column);
    for (int i = 0; i < 8; i++) sum[r][i] = part[i];
  }
  for (int k = 0; k < RANK; k++) {
    Pack<T, 8> part;
    part.load(b + size_t(k) * OUT + column);
    for (int r = 0; r < ROWS; r++) {
      const float z = first + r < rows ? static_cast<float>(low[size_t(first + r) * WIDE + k]) : 0.f;
      for (int i = 0; i < 8; i++) sum[r][i] += z * part[i];
    }
  }
  for (int r = 0; r < ROWS && first + r < rows; r++) {
    Pack<T, 8> part;
    for (int i = 0; i < 8; i++) reinterpret_cast<T*>(part.raw)[i] = static_cast<T>(sum[r][i]);
    part.store(to[layer] + size_t(first + r) * width + column - start);
  }
"""

# LANES lanes have one head of ROWS rows, eight neighbours each; the rotation mixes them with those half a head away,
# which lane ^ HALF has. OUT numbers of y are the heads' without their LoRAs; z follows, RANK for each of the layers.
_HEADS = """
  constexpr int ROWS = 4, LANES = D / 8, HALF = LANES / 2;
  const int lane = threadIdx.x % LANES, first = blockIdx.y * ROWS, rows = y_shape[0];
  const int asked = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES, head = min(asked, QUERIES + 2 * KEYS - 1);
  const int layer = head < QUERIES ? 0 : head < QUERIES + KEYS ? 1 : 2, column = head * D + lane * 8;
  __shared__ float z[ROWS][3 * RANK];
  for (int j = threadIdx.x; j < ROWS * 3 * RANK; j += THREADS) {
    const int row = min(first + j / (3 * RANK), rows - 1);
    z[j / (3 * RANK)][j % (3 * RANK)] = static_cast<float>(y[size_t(row) * WIDE + OUT + j % (3 * RANK)]);
  }
  Pack<T, 8> part;
  float x[ROWS][8], weight[8];
  #pragma unroll
  for (int r = 0; r < ROWS; r++) {
    part.load(y + size_t(min(first + r, rows - 1)) * WIDE + column);
    #pragma unroll
    for (int i = 0; i < 8; i++) x[r][i] = part[i];
  }
  if (NORMED) part.load((layer == 0 ? query_norm : key_norm) + lane * 8);
  #pragma unroll
  for (int i = 0; i < 8; i++) weight[i] = NORMED ? part[i] : 1.f;
  __syncthreads();
  #pragma unroll
  for (int k = 0; k < RANK; k++) {
    part.load(b + size_t(k) * OUT + column);
    #pragma unroll
    for (int r = 0; r < ROWS; r++)
      #pragma unroll
      for (int i = 0; i < 8; i++) x[r][i] += z[r][layer * RANK + k] * part[i];
  }
  const int place = layer == 0 ? head : layer == 1 ? head - QUERIES : head - QUERIES - KEYS;
  T* to = layer == 0 ? queries : layer == 1 ? keys : values;
  #pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const size_t row = min(first + r, rows - 1);
    float squares = 0, shrink = 1;
    if (NORMED) {
      #pragma unroll
      for (int i = 0; i < 8; i++) squares += x[r][i] * x[r][i];
      #pragma unroll
      for (int d = LANES / 2; d > 0; d /= 2) squares += __shfl_xor_sync(0xffffffff, squares, d);
      shrink = rsqrtf(squares / D + EPSILON);
    }
    #pragma unroll
    for (int i = 0; i < 8; i++) {
      const float own = x[r][i] * shrink * weight[i], other = __shfl_xor_sync(0xffffffff, own, HALF);
      const size_t at = row * (D / 2) + (lane % HALF) * 8 + i;
      const float turned = own * cosines[at] + (lane < HALF ? -other : other) * sines[at];
      reinterpret_cast<T*>(part.raw)[i] = static_cast<T>(layer < 2 ? turned : x[r][i]);
    }
    if (asked == head && first + r < rows)
      part.store(to + (row * (layer == 0 ? QUERIES : KEYS) + place) * D + lane * 8);
  }
"""

# A block of threads has a row, each thread eight neighbours of it.
_ADD_AND_NORM = """
  const int row = blockIdx.x, column = min(int(threadIdx.x) * 8, OUT - 8);
  const bool live = threadIdx.x * 8 < OUT;
  __shared__ float parts[32], z[RANK];
  for (int k = threadIdx.x; k < RANK; k += THREADS) z[k] = static_cast<float>(y[size_t(row) * WIDE + OUT + k]);
  Pack<T, 8> part, before, weight, sum;
  part.load(y + size_t(row) * WIDE + column);
  before.load(residual + size_t(row) * OUT + column);
  weight.load(norm + column);
  float x[8], squares = 0;
  #pragma unroll
  for (int i = 0; i < 8; i++) x[i] = part[i];
  __syncthreads();
  #pragma unroll
  for (int k = 0; k < RANK; k++) {
    part.load(b + size_t(k) * OUT + column);
    #pragma unroll
    for (int i = 0; i < 8; i++) x[i] += z[k] * part[i];
  }
  #pragma unroll
  for (int i = 0; i < 8; i++) reinterpret_cast<T*>(sum.raw)[i] = static_cast<T>(x[i] + before[i]);
  #pragma unroll
  for (int i = 0; i < 8; i++) squares += live ? sum[i] * sum[i] : 0.f;
  #pragma unroll
  for (int d = 16; d > 0; d /= 2) squares += __shfl_xor_sync(0xffffffff, squares, d);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = squares;
  __syncthreads();
  squares = 0;
  #pragma unroll
  for (int w = 0; w < THREADS / 32; w++) squares += parts[w];
  const float shrink = rsqrtf(squares / OUT + EPSILON);
  if (!live) return;
  sum.store(added + size_t(row) * OUT + column);
  #pragma unroll
  for (int i = 0; i < 8; i++) reinterpret_cast<T*>(part.raw)[i] = static_cast<T>(sum[i] * shrink * weight[i]);
  part.store(normed + size_t(row) * OUT + column);
"""

# Every thread makes eight neighbouring outputs of ROWS rows.
_SWIGLU = """
  constexpr int ROWS = 4, OUT = 2 * INNER;
  const int asked = (blockIdx.x * THREADS + threadIdx.x) * 8, first = blockIdx.y * ROWS, rows = y_shape[0];
  const int column = min(asked, INNER - 8);
  __shared__ float z[ROWS][2 * RANK];
  for (int j = threadIdx.x; j < ROWS * 2 * RANK; j += THREADS) {
    const int row = min(first + j / (2 * RANK), rows - 1);
    z[j / (2 * RANK)][j % (2 * RANK)] = static_cast<float>(y[size_t(row) * WIDE + OUT + j % (2 * RANK)]);
  }
  Pack<T, 8> part;
  float x[2][ROWS][8];
  #pragma unroll
  for (int layer = 0; layer < 2; layer++) {
    #pragma unroll
    for (int r = 0; r < ROWS; r++) {
      part.load(y + size_t(min(first + r, rows - 1)) * WIDE + layer * INNER + column);
      #pragma unroll
      for (int i = 0; i < 8; i++) x[layer][r][i] = part[i];
    }
  }
  __syncthreads();
  #pragma unroll
  for (int k = 0; k < RANK; k++) {
    #pragma unroll
    for (int layer = 0; layer < 2; layer++) {
      part.load(b + size_t(k) * OUT + layer * INNER + column);
      #pragma unroll
      for (int r = 0; r < ROWS; r++)
        #pragma unroll
        for (int i = 0; i < 8; i++) x[layer][r][i] += z[r][layer * RANK + k] * part[i];
    }
  }
  #pragma unroll
  for (int r = 0; r < ROWS; r++) {
    if (asked != column || first + r >= rows) return;
    #pragma unroll
    for (int i = 0; i < 8; i++) {
      const float gate = x[0][r][i], up = x[1][r][i];
      reinterpret_cast<T*>(part.raw)[i] = static_cast<T>(gate / (1.f + expf(-gate)) * up);
    }
    part.store(out + size_t(first + r) * INNER + column);
  }
"""

# One block of threads per row. A warp takes 256 tokens at a time and leaves their maximum m, the sum s of
# exp(z - m) and the sum e of exp(z - m) (z - m); from these come log-probs, entropy and the 256 to draw from.
_DRAW = """
  constexpr int WARPS = THREADS / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = blockIdx.x;
  const int vocabulary = logits_shape[1], blocks = (vocabulary + 255) / 256;
  const T* z = logits + size_t(state[row]) * vocabulary;
  const float cold = 1.0f / TEMPERATURE;
  __shared__ float m[BLOCKS], s[BLOCKS], e[BLOCKS];

  for (int b = warp; b < blocks; b += WARPS) {
    const int at = b * 256 + lane * 8;
    Pack<T, 8> part;
    float x[8], top = -INFINITY, sum = 0, spread = 0;
    if (at < vocabulary) part.load(z + at);
    for (int i = 0; i < 8; i++) { x[i] = at < vocabulary ? part[i] * cold : -INFINITY; top = fmaxf(top, x[i]); }
    for (int d = 16; d > 0; d /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, d));
    for (int i = 0; i < 8; i++) {
      const float p = x[i] > -INFINITY ? expf(x[i] - top) : 0.f;
      sum += p;
      spread += p > 0 ? p * (x[i] - top) : 0.f;
    }
    for (int d = 16; d > 0; d /= 2) {
      sum += __shfl_xor_sync(0xffffffff, sum, d);
      spread += __shfl_xor_sync(0xffffffff, spread, d);
    }
    if (lane == 0) { m[b] = top; s[b] = sum; e[b] = spread; }
  }
  __syncthreads();
  if (warp > 0) return;

  float top = -INFINITY;
  for (int b = lane; b < blocks; b += 32) top = fmaxf(top, m[b]);
  for (int d = 16; d > 0; d /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, d));
  const int each = (blocks + 31) / 32, first = lane * each, end = min(blocks, first + each);
  float mine = 0, spread = 0;
  for (int b = first; b < end; b++) {
    const float w = s[b] > 0 ? expf(m[b] - top) : 0.f;
    mine += w * s[b];
    spread += w > 0 ? w * (e[b] + (m[b] - top) * s[b]) : 0.f;
  }
  float running = mine;  // of this lane's blocks and all before
  for (int d = 1; d < 32; d *= 2) {
    const float other = __shfl_up_sync(0xffffffff, running, d);
    if (lane >= d) running += other;
  }
  for (int d = 16; d > 0; d /= 2) spread += __shfl_xor_sync(0xffffffff, spread, d);
  const float total = __shfl_sync(0xffffffff, running, 31), point = uniform[row] * total;

  // The block in which the running sum passes the point; rounding may leave none, then the last with mass.
  int block = -1, last = -1;
  float before = running - mine;
  for (int b = first; b < end; b++) {
    const float mass = s[b] > 0 ? expf(m[b] - top) * s[b] : 0.f;
    if (mass > 0) last = b;
    if (block < 0 && before + mass > point) block = b;
    if (block < 0) before += mass;
  }
  const unsigned found = __ballot_sync(0xffffffff, block >= 0);
  for (int d = 16; d > 0; d /= 2) last = max(last, __shfl_xor_sync(0xffffffff, last, d));
  const int chooser = found ? __ffs(found) - 1 : 31;
  block = found ? __shfl_sync(0xffffffff, block, chooser) : last;
  before = __shfl_sync(0xffffffff, before, chooser);

  const int at = block * 256 + lane * 8;
  Pack<T, 8> part;
  float p[8], own = 0, x_top = -INFINITY;
  int likeliest = at;
  if (at < vocabulary) part.load(z + at);
  for (int i = 0; i < 8; i++) {
    const float x = at < vocabulary ? part[i] * cold : -INFINITY;
    p[i] = x > -INFINITY ? expf(x - top) : 0.f;
    own += p[i];
    if (x > x_top) { x_top = x; likeliest = at + i; }
  }
  float upto = own;
  for (int d = 1; d < 32; d *= 2) {
    const float other = __shfl_up_sync(0xffffffff, upto, d);
    if (lane >= d) upto += other;
  }
  int token = -1;
  float sum = before + upto - own;
  for (int i = 0; i < 8; i++) {
    sum += p[i];
    if (token < 0 && p[i] > 0 && sum > point) token = at + i;
  }
  const unsigned passed = __ballot_sync(0xffffffff, token >= 0);
  for (int d = 16; d > 0; d /= 2) {
    const float other = __shfl_xor_sync(0xffffffff, x_top, d);
    const int its = __shfl_xor_sync(0xffffffff, likeliest, d);
    if (other > x_top || (other == x_top && its < likeliest)) { x_top = other; likeliest = its; }
  }
  token = passed ? __shfl_sync(0xffffffff, token, __ffs(passed) - 1) : likeliest;
  if (lane == 0) {
    const float log_total = logf(total);
    tokens[row] = token;
    logprobs[row] = static_cast<float>(z[token]) * cold - top - log_total;
    entropy[row] = log_total - spread / total;
  }
"""

HEAD_SIZES = (64, 128)  # LANES divide a warp
_TOGETHER = (4, 3, 2, 1)  # query heads of one block of threads; they share their keys
_TILES = (2, 1)  # rows of one block; with four of them too few blocks fit a multiprocessor
_BLOCKS = 256  # with fewer, some of a GPU's multiprocessors have nothing to do


def is_default() -> bool:
    """Whether MLX computes on an NVIDIA GPU unless told otherwise."""
    return mx.default_device() == mx.Device(mx.gpu) and not mx.metal.is_available()


def can_attend(queries: mx.array, values: mx.array) -> bool:
    """Whether ``attend`` knows these shapes: one query per row, heads of 64 or 128 numbers."""
    size = queries.shape[-1]
    return is_default() and queries.shape[2] == 1 and size in HEAD_SIZES and values.shape[-1] == size


def attend(
    queries: mx.array,
    fresh: Sequence[mx.array],
    own: Sequence[mx.array],
    prefix: Sequence[mx.array],
    parents: mx.array,
    seen: mx.array,
    last: mx.array,
    scale: float,
) -> mx.array:
    """(B, heads, 1, D): what each row's query finds in the prefix that it shares with others, and in its own slots.

    queries (B, heads, 1, D). The others are keys and values: ``fresh`` (B, kv heads, 1, D) arrive with the
    query; ``own`` (B, kv heads, C, D), contiguous, of which slot ``last`` (n,) int32 is the last in use;
    ``prefix`` (U, kv heads, P, D), of which row b continues row ``parents[b]``. seen (B, P + C) bool is what
    a row may attend to; what it may not is finite too. Writes ``fresh`` into slot ``last`` of ``own`` in place, which
    MLX does not see: a copy of the slots in each step would take longer than all the rest, and a step waits for the
    one before.
    """
    rows, heads, _, size = queries.shape
    per_kv, threads = heads // own[0].shape[1], 256
    together = next(g for g in _TOGETHER if per_kv % g == 0 and g * size <= 256)
    blocks = rows * heads // together
    tile = next(t for t in _TILES if t == 1 or blocks >= t * _BLOCKS)
    sizes = {"D": size, "G": together, "PER_KV": per_kv, "HEADS": heads, "THREADS": threads, "TILE": tile}
    [out] = _attend_kernel(scale)(
        inputs=[queries, *fresh, *own, *prefix, parents, seen, last],
        template=[("T", queries.dtype), *sizes.items()],
        grid=(threads * (heads // together), -(-rows // tile), 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[queries.shape],
        output_dtypes=[queries.dtype],
    )
    return out


def add_lora(y: mx.array, b: mx.array, widths: Sequence[int]) -> list[mx.array]:
    """The outputs (N, widths[i]) of layers with a LoRA of one rank r each, from their joined product.

    y (N, sum of widths + layers * r) holds the outputs of all without their LoRAs and then each one's x A;
    ``b`` (r, sum of widths) their B side by side, scales included. Widths and the width of y are multiples of 8.
    """
    rank, out = b.shape
    rows, wide = y.shape
    return _add_lora_kernel(tuple(widths))(
        inputs=[y, b],
        template=[("T", y.dtype), ("RANK", rank), ("OUT", out), ("WIDE", wide)],
        grid=(-(-out // 8), -(-rows // 8), 1),
        threadgroup=(min(128, -(-out // 8)), 1, 1),
        output_shapes=[(rows, width) for width in widths],
        output_dtypes=[y.dtype] * len(widths),
    )


def heads(
    y: mx.array,
    b: mx.array,
    counts: tuple[int, int],
    norms: tuple[mx.array, mx.array] | None,
    epsilon: float,
    turns: tuple[mx.array, mx.array],
) -> list[mx.array]:
    """Queries (N, Q, 1, D), keys and values (N, K, 1, D) of one token per row: with their LoRAs, normed and rotated.

    ``y`` and ``b`` are as in ``add_lora``, for the three layers in this order; counts are (Q, K). ``norms`` holds
    the weights (D,) of RMS norms with ``epsilon`` over each query and key, if there are any. Numbers i and
    i + D/2 of both are rotated by the angles whose cosines and sines (N, D/2) float32 ``turns`` holds.
    """
    (queries, keys), size = counts, 2 * turns[0].shape[1]
    rank, out = b.shape
    rows, wide = y.shape
    every, threads, together = queries + 2 * keys, 256, 4
    weights = norms or (b, b)  # not read without norms
    return _heads_kernel(epsilon)(
        inputs=[y, b, *weights, *turns],
        template=[
            ("T", y.dtype), ("D", size), ("QUERIES", queries), ("KEYS", keys), ("RANK", rank), ("OUT", out),
            ("WIDE", wide), ("NORMED", norms is not None), ("THREADS", threads),
        ],
        grid=(threads * -(-every * size // (8 * threads)), -(-rows // together), 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(rows, queries, 1, size), (rows, keys, 1, size), (rows, keys, 1, size)],
        output_dtypes=[y.dtype] * 3,
    )  # fmt: skip


def add_and_norm(
    y: mx.array, b: mx.array, residual: mx.array, norm: mx.array, epsilon: float
) -> tuple[mx.array, mx.array]:
    """``residual`` (N, W) and a layer's output together, and the RMS norm of that with weights ``norm`` (W,).

    ``y`` and ``b`` are as in ``add_lora``, for the one layer; W is a multiple of 8 and at most 8192.
    """
    rank, out = b.shape
    rows, wide = y.shape
    threads = 32 * -(-out // 256)
    added, normed = _add_and_norm_kernel(epsilon)(
        inputs=[y, b, residual, norm],
        template=[("T", y.dtype), ("RANK", rank), ("OUT", out), ("WIDE", wide), ("THREADS", threads)],
        grid=(threads * rows, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[residual.shape] * 2,
        output_dtypes=[y.dtype] * 2,
    )
    return added, normed


def swiglu(y: mx.array, b: mx.array) -> mx.array:
    """(N, W): SiLU(gate) * up of two layers of W outputs each; ``y`` and ``b`` are as in ``add_lora``."""
    rank, inner = b.shape[0], b.shape[1] // 2
    rows, wide = y.shape
    threads = min(128, -(-inner // 8))
    [out] = _swiglu_kernel()(
        inputs=[y, b],
        template=[("T", y.dtype), ("RANK", rank), ("INNER", inner), ("WIDE", wide), ("THREADS", threads)],
        grid=(threads * -(-inner // (8 * threads)), -(-rows // 4), 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(rows, inner)],
        output_dtypes=[y.dtype],
    )
    return out


def draw(logits: mx.array, state: mx.array, uniform: mx.array, temperature: float) -> tuple[Any, Any, Any]:
    """Tokens, log-probs and entropies (R,) as ``sampling.draw`` gives them, of (C, V) logits with V a multiple of 8."""
    rows, vocabulary = state.size, logits.shape[-1]
    out = _draw_kernel(temperature)(
        inputs=[logits, state.astype(mx.int32), uniform],
        template=[("T", logits.dtype), ("THREADS", 1024), ("BLOCKS", -(-vocabulary // 256))],
        grid=(1024 * rows, 1, 1),
        threadgroup=(1024, 1, 1),
        output_shapes=[(rows,)] * 3,
        output_dtypes=[mx.int32, mx.float32, mx.float32],
    )
    return out[0], out[1], out[2]


def _kernel(name: str, inputs: Sequence[str], outputs: Sequence[str], source: str, load: str, **numbers: float) -> Any:
    """``numbers`` stand in the source: an array of one is in the host's memory, and reading that is slow."""
    for key, number in numbers.items():
        source = source.replace(key, f"{np.float32(number)!s}f")
        name += f"_{np.float32(number).tobytes().hex()}"
    return mx.fast.cuda_kernel(f"textpolicy_{name}", list(inputs), list(outputs), source, header=load)


@cache
def _attend_kernel(scale: float) -> Any:
    parts = [f"{where}{what}" for where in ("fresh_", "", "prefix_") for what in ("keys", "values")]
    return _kernel("attend", ["queries", *parts, "parents", "seen", "last"], ["out"], _ATTEND, _ABSORB, SCALE=scale)


@cache
def _add_lora_kernel(widths: tuple[int, ...]) -> Any:
    names = [f"out{i}" for i in range(len(widths))]
    ends = ", ".join(str(end) for end in accumulate(widths))
    source = _ADD_LORA.replace("TARGETS", ", ".join(names)).replace("ENDS", ends)
    return _kernel("lora_" + "_".join(map(str, widths)), ["y", "b"], names, source, _LOAD)


@cache
def _heads_kernel(epsilon: float) -> Any:
    names = ["y", "b", "query_norm", "key_norm", "cosines", "sines"]
    return _kernel("heads", names, ["queries", "keys", "values"], _HEADS, _LOAD, EPSILON=epsilon)


@cache
def _add_and_norm_kernel(epsilon: float) -> Any:
    names = ["y", "b", "residual", "norm"]
    return _kernel("add_and_norm", names, ["added", "normed"], _ADD_AND_NORM, _LOAD, EPSILON=epsilon)


@cache
def _swiglu_kernel() -> Any:
    return _kernel("swiglu", ["y", "b"], ["out"], _SWIGLU, _LOAD)


@cache
def _draw_kernel(temperature: float) -> Any:
    names = ["logits", "state", "uniform"]
    return _kernel("draw", names, ["tokens", "logprobs", "entropy"], _DRAW, _LOAD, TEMPERATURE=temperature)
