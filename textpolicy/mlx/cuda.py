"""Three CUDA kernels for decoding: attention of one query per row, LoRAs of several layers, and drawing a token.

MLX's own attention wants a plan for every new length and leaves its fast path under a mask; its sampling
passes over the logits many times. These take the length and the mask as data and read everything once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import mlx.core as mx

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

# Eight lanes hold one key at a time, N numbers each. Every team of eight walks through its share of the slots with
# a softmax of its own (online, arXiv:1805.02867), two slots at a time, and in the end the teams' sums are joined.
# The arriving key and value are read from where they come and written to their slot in place.
_ATTEND = """
  constexpr int AT_ONCE = 2, LANES = 8, N = D / LANES, TEAMS = THREADS / LANES;
  const int lane = threadIdx.x % LANES, team = threadIdx.x / LANES;
  const int row = blockIdx.y, head = blockIdx.x * G, kv = head / PER_KV;
  const int prefix = prefix_keys_shape[2], capacity = keys_shape[2], heads = keys_shape[1];
  const int newest = prefix + last[0], slots = newest + 1, stride = prefix + capacity;
  const size_t fresh_at = (size_t(row) * heads + kv) * D + lane * N;
  const size_t shared_at = (size_t(parents[row]) * heads + kv) * prefix * D + lane * N;
  const size_t own_at = (size_t(row) * heads + kv) * capacity * D + lane * N;
  const bool* visible = seen + size_t(row) * stride;

  if (team == 0 && head % PER_KV == 0) {
    Pack<T, N> part;
    part.load(fresh_keys + fresh_at);
    part.store(const_cast<T*>(keys) + own_at + size_t(last[0]) * D);
    part.load(fresh_values + fresh_at);
    part.store(const_cast<T*>(values) + own_at + size_t(last[0]) * D);
  }
  float q[G][N], sum[G][N], most[G], total[G];
  for (int g = 0; g < G; g++) {
    Pack<T, N> part;
    part.load(queries + (size_t(row) * HEADS + head + g) * D + lane * N);
    most[g] = -INFINITY;
    total[g] = 0;
    for (int i = 0; i < N; i++) { q[g][i] = part[i] * scale[0] * 1.4426950408889634f; sum[g][i] = 0; }
  }
  for (int begin = 0; begin < slots; begin += TEAMS * AT_ONCE) {  // all lanes alike: they exchange sums
    Pack<T, N> k[AT_ONCE], v[AT_ONCE];
    bool live[AT_ONCE];
    for (int u = 0; u < AT_ONCE; u++) {
      const int slot = begin + u * TEAMS + team;
      live[u] = slot < slots && visible[slot];
      k[u].zero();
      v[u].zero();
      if (live[u]) {
        const bool common = slot < prefix, fresh = slot == newest;
        const size_t at = fresh ? fresh_at : common ? shared_at + size_t(slot) * D : own_at + size_t(slot - prefix) * D;
        k[u].load((fresh ? fresh_keys : common ? prefix_keys : keys) + at);
        v[u].load((fresh ? fresh_values : common ? prefix_values : values) + at);
      }
    }
    for (int g = 0; g < G; g++) {
      float score[AT_ONCE], top = most[g];
      for (int u = 0; u < AT_ONCE; u++) {
        float dot = 0;
        for (int i = 0; i < N; i++) dot += q[g][i] * k[u][i];
        for (int d = LANES / 2; d > 0; d /= 2) dot += __shfl_xor_sync(0xffffffff, dot, d);
        score[u] = live[u] ? dot : -INFINITY;
        top = fmaxf(top, score[u]);
      }
      if (top > -INFINITY) {
        const float keep = exp2f(most[g] - top);
        float p[AT_ONCE];
        total[g] *= keep;
        for (int u = 0; u < AT_ONCE; u++) { p[u] = exp2f(score[u] - top); total[g] += p[u]; }
        for (int i = 0; i < N; i++) {
          float value = sum[g][i] * keep;
          for (int u = 0; u < AT_ONCE; u++) value += p[u] * v[u][i];
          sum[g][i] = value;
        }
        most[g] = top;
      }
    }
  }
  // Teams of a warp join by exchange, warps through shared memory.
  for (int d = LANES; d < 32; d *= 2) {
    for (int g = 0; g < G; g++) {
      const float other = __shfl_xor_sync(0xffffffff, most[g], d), top = fmaxf(most[g], other);
      const float mine = most[g] > -INFINITY ? exp2f(most[g] - top) : 0.f;
      const float theirs = other > -INFINITY ? exp2f(other - top) : 0.f;
      total[g] = total[g] * mine + __shfl_xor_sync(0xffffffff, total[g], d) * theirs;
      for (int i = 0; i < N; i++) sum[g][i] = sum[g][i] * mine + __shfl_xor_sync(0xffffffff, sum[g][i], d) * theirs;
      most[g] = top;
    }
  }
  constexpr int WARPS = THREADS / 32;
  __shared__ float tops[WARPS][G], totals[WARPS][G], sums[WARPS][G][D];
  if (threadIdx.x % 32 < LANES) {
    const int warp = threadIdx.x / 32;
    for (int g = 0; g < G; g++) {
      if (lane == 0) { tops[warp][g] = most[g]; totals[warp][g] = total[g]; }
      for (int i = 0; i < N; i++) sums[warp][g][lane * N + i] = sum[g][i];
    }
  }
  __syncthreads();
  for (int j = threadIdx.x; j < G * D; j += THREADS) {
    const int g = j / D, d = j % D;
    float top = -INFINITY, weight = 0, value = 0;
    for (int t = 0; t < WARPS; t++) top = fmaxf(top, tops[t][g]);
    for (int t = 0; t < WARPS && top > -INFINITY; t++) {
      const float w = exp2f(tops[t][g] - top);
      weight += w * totals[t][g];
      value += w * sums[t][g][d];
    }
    out[(size_t(row) * HEADS + head + g) * D + d] = static_cast<T>(weight > 0 ? value / weight : 0.f);
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

# One block of threads per row. A warp takes 256 tokens at a time and leaves their maximum m, the sum s of
# exp(z - m) and the sum e of exp(z - m) (z - m); from these come log-probs, entropy and the 256 to draw from.
_DRAW = """
  constexpr int WARPS = THREADS / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = blockIdx.x;
  const int vocabulary = logits_shape[1], blocks = (vocabulary + 255) / 256;
  const T* z = logits + size_t(state[row]) * vocabulary;
  const float cold = 1.0f / temperature[0];
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

_HEAD_SIZES = (64, 128, 256)
_TOGETHER = (4, 3, 2, 1)  # query heads of one block of threads; they share their keys


def is_default() -> bool:
    """Whether MLX computes on an NVIDIA GPU unless told otherwise."""
    return mx.default_device() == mx.Device(mx.gpu) and not mx.metal.is_available()


def can_attend(queries: mx.array, values: mx.array) -> bool:
    """Whether ``attend`` knows these shapes: one query per row, heads of 64, 128 or 256 numbers."""
    size = queries.shape[-1]
    return is_default() and queries.shape[2] == 1 and size in _HEAD_SIZES and values.shape[-1] == size


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
    query; ``own`` (B, kv heads, C, D), contiguous, of which slot ``last`` (1,) int32 is the last in use;
    ``prefix`` (U, kv heads, P, D), of which row b continues row ``parents[b]``. seen (B, P + C) bool is what
    a row may attend to. Writes ``fresh`` into slot ``last`` of ``own`` in place, which MLX does not see:
    a copy of the slots in each step would take longer than all the rest, and a step waits for the one before.
    """
    rows, heads, _, size = queries.shape
    per_kv = heads // own[0].shape[1]
    together = next(g for g in _TOGETHER if per_kv % g == 0 and g * size <= 256)
    threads = 128 if rows * heads // together >= 512 else 512
    sizes = {"D": size, "G": together, "PER_KV": per_kv, "HEADS": heads, "THREADS": threads}
    [out] = _attend_kernel()(
        inputs=[queries, *fresh, *own, *prefix, parents, seen, last, mx.array([scale], mx.float32)],
        template=[("T", queries.dtype), *sizes.items()],
        grid=(threads * (heads // together), rows, 1),
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


def draw(logits: mx.array, state: mx.array, uniform: mx.array, temperature: float) -> tuple[Any, Any, Any]:
    """Tokens, log-probs and entropies (R,) as ``sampling.draw`` gives them, of (C, V) logits with V a multiple of 8."""
    rows, vocabulary = state.size, logits.shape[-1]
    out = _draw_kernel()(
        inputs=[logits, state.astype(mx.int32), uniform, mx.array([temperature], mx.float32)],
        template=[("T", logits.dtype), ("THREADS", 1024), ("BLOCKS", -(-vocabulary // 256))],
        grid=(1024 * rows, 1, 1),
        threadgroup=(1024, 1, 1),
        output_shapes=[(rows,)] * 3,
        output_dtypes=[mx.int32, mx.float32, mx.float32],
    )
    return out[0], out[1], out[2]


@cache
def _attend_kernel() -> Any:
    parts = [f"{where}{what}" for where in ("fresh_", "", "prefix_") for what in ("keys", "values")]
    names = ["queries", *parts, "parents", "seen", "last", "scale"]
    return mx.fast.cuda_kernel("textpolicy_attend", names, ["out"], _ATTEND, header=_LOAD)


@cache
def _add_lora_kernel(widths: tuple[int, ...]) -> Any:
    names = [f"out{i}" for i in range(len(widths))]
    ends = ", ".join(str(end) for end in accumulate(widths))
    source = _ADD_LORA.replace("TARGETS", ", ".join(names)).replace("ENDS", ends)
    return mx.fast.cuda_kernel("textpolicy_lora_" + "_".join(map(str, widths)), ["y", "b"], names, source, header=_LOAD)


@cache
def _draw_kernel() -> Any:
    names = ["logits", "state", "uniform", "temperature"]
    return mx.fast.cuda_kernel("textpolicy_draw", names, ["tokens", "logprobs", "entropy"], _DRAW, header=_LOAD)
