"""The CUDA source of the kernels in cuda.py but attention's. Names in capitals are constants of a kernel."""

from __future__ import annotations

LOAD = """
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

# Every thread adds z B to eight neighbouring outputs of ROWS rows; B is (RANK, OUT), z (rows, RANK) for each layer.
ADD_LORA = """
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
HEADS = """
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
ADD_AND_NORM = """
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
SWIGLU = """
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
DRAW = """
  constexpr int WARPS = THREADS / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = blockIdx.x;
  const int vocabulary = logits_shape[1], blocks = (vocabulary + 255) / 256;
  const T* z = logits + size_t(state[row]) * vocabulary;
  const float cold = 1.0f / TEMPERATURE;
  int* tokens = drawn;
  float *logprobs = reinterpret_cast<float*>(drawn + gridDim.x), *entropy = logprobs + gridDim.x;
  __shared__ float m[BLOCKS], s[BLOCKS], e[BLOCKS];

  for (int b = warp; b < blocks; b += WARPS) {
    const int at = b * 256 + lane * 8;
    Pack<T, 8> part;
    float x[8], top = -INFINITY, sum = 0, spread = 0;
    if (at < vocabulary) part.load(z + at);
    for (int i = 0; i < 8; i++) { x[i] = at < vocabulary ? part[i] * cold : -INFINITY; top = fmaxf(top, x[i]); }
    for (int d = 16; d > 0; d /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, d));
    for (int i = 0; i < 8; i++) {
      const float p = x[i] == -INFINITY ? 0.f : expf(x[i] - top);  // NaN stays NaN
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
    const float w = s[b] == 0 ? 0.f : expf(m[b] - top);
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
  if (!(total > 0 && total < INFINITY)) {  // a logit is no number
    if (lane == 0) { tokens[row] = 0; logprobs[row] = -INFINITY; entropy[row] = -INFINITY; }
    return;
  }

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

# A block of threads has a row z of logits, each thread eight neighbours of it at a time. One pass finds the maximum m,
# the sum s of exp(z - m) and the sum e of exp(z - m) (z - m); another makes the slopes of the target's log-prob by z.
SCORE = """
  constexpr int WARPS = THREADS / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int vocabulary = logits_shape[1], target = targets[blockIdx.x];
  const T* z = logits + size_t(blockIdx.x) * vocabulary;
  const float cold = 1.0f / temperatures[blockIdx.x];
  __shared__ Masses shared[WARPS];
  Pack<T, 8> part;
  Masses all = {-INFINITY, 0, 0};
  for (int at = threadIdx.x * 8; at < vocabulary; at += THREADS * 8) {
    Masses here = {-INFINITY, 0, 0};
    part.load(z + at);
    for (int i = 0; i < 8; i++) here.m = fmaxf(here.m, part[i] * cold);
    for (int i = 0; i < 8; i++) {
      const float x = part[i] * cold, p = x == -INFINITY ? 0.f : expf(x - here.m);  // NaN stays NaN
      here.s += p;
      here.e += p > 0 ? p * (x - here.m) : 0.f;
    }
    all.add(here);
  }
  all.add_lanes();
  if (lane == 0) shared[warp] = all;
  __syncthreads();
  all = lane < WARPS ? shared[lane] : Masses{-INFINITY, 0, 0};
  all.add_lanes();
  if (threadIdx.x == 0) {
    logprobs[blockIdx.x] = static_cast<float>(z[target]) * cold - all.m - logf(all.s);
    entropy[blockIdx.x] = logf(all.s) - all.e / all.s;
  }
  if (!SLOPES) return;
  T* to = slopes + size_t(blockIdx.x) * vocabulary;
  for (int at = threadIdx.x * 8; at < vocabulary; at += THREADS * 8) {
    part.load(z + at);
    for (int i = 0; i < 8; i++) {
      const float p = expf(part[i] * cold - all.m) / all.s;
      reinterpret_cast<T*>(part.raw)[i] = static_cast<T>(((at + i == target ? 1.f : 0.f) - p) * cold);
    }
    part.store(to + at);
  }
"""

MASSES = (
    LOAD
    + """
struct Masses {
  float m, s, e;
  __device__ void add(const Masses& other) {
    const float top = fmaxf(m, other.m), mine = m == top ? 1.f : expf(m - top);
    const float its = other.m == top ? 1.f : expf(other.m - top);
    e = (mine > 0 ? mine * (e + (m == top ? 0.f : (m - top) * s)) : 0.f) +
        (its > 0 ? its * (other.e + (other.m == top ? 0.f : (other.m - top) * other.s)) : 0.f);
    s = mine * s + its * other.s;
    m = top;
  }
  __device__ void add_lanes() {  // of a warp; lane 0 has the last word, as rounding depends on the order
    for (int d = 16; d > 0; d /= 2)
      add({__shfl_xor_sync(0xffffffff, m, d), __shfl_xor_sync(0xffffffff, s, d), __shfl_xor_sync(0xffffffff, e, d)});
    m = __shfl_sync(0xffffffff, m, 0); s = __shfl_sync(0xffffffff, s, 0); e = __shfl_sync(0xffffffff, e, 0);
  }
};
"""
)
