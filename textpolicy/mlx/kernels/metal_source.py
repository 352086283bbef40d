"""The Metal source of the kernels in metal.py, which documents them. Names in capitals are constants of a kernel.

They compute in float32 whatever the arrays hold, and read them by index alone: MLX passes an array of fewer than eight
numbers in another address space, where a pointer of a written-out type would not compile.
"""

from __future__ import annotations

# A threadgroup has a row and G heads that share their keys. Each simdgroup takes every SIMDS-th slot, its lanes
# PER_LANE neighbouring numbers of a key, with a softmax as it goes (online, arXiv:1805.02867); in the end the
# simdgroups' sums are joined, a head at a time. The arriving key and value are read from where they come.
ATTEND = """
  constexpr int SIMDS = THREADS / 32, PER_LANE = D / 32;
  const int lane = thread_index_in_simdgroup, simd = simdgroup_index_in_threadgroup;
  const int head = threadgroup_position_in_grid.x * G, kv = head / PER_KV, row = threadgroup_position_in_grid.y;
  const int kv_heads = keys_shape[1], prefix = prefix_keys_shape[2], capacity = keys_shape[2], newest = last[0];
  const int part = lane * PER_LANE;
  const size_t shared_at = (size_t(parents[row]) * kv_heads + kv) * prefix * D + part;
  const size_t own_at = (size_t(row) * kv_heads + kv) * capacity * D + part;
  const size_t fresh_at = (size_t(row) * kv_heads + kv) * D + part;
  const size_t query_at = (size_t(row) * HEADS + head) * D + part;

  if (simd == 0 && head % PER_KV == 0) {
    for (int i = 0; i < PER_LANE; i++) {
      const_cast<device S*>(keys)[own_at + size_t(newest) * D + i] = fresh_keys[fresh_at + i];
      const_cast<device S*>(values)[own_at + size_t(newest) * D + i] = fresh_values[fresh_at + i];
    }
  }

  float q[G][PER_LANE], sum[G][PER_LANE], most[G], total[G];
  #pragma unroll
  for (int g = 0; g < G; g++) {
    most[g] = LOWEST;
    total[g] = 0;
    for (int i = 0; i < PER_LANE; i++) {
      q[g][i] = static_cast<float>(queries[query_at + g * D + i]) * SCALE;
      sum[g][i] = 0;
    }
  }
  for (int slot = simd; slot <= prefix + newest; slot += SIMDS) {
    if (!seen[size_t(row) * (prefix + capacity) + slot]) continue;  // all lanes of a simdgroup have the same slot
    const device S* key = fresh_keys + fresh_at;
    const device S* value = fresh_values + fresh_at;
    if (slot < prefix) {
      key = prefix_keys + shared_at + size_t(slot) * D;
      value = prefix_values + shared_at + size_t(slot) * D;
    } else if (slot < prefix + newest) {
      key = keys + own_at + size_t(slot - prefix) * D;
      value = values + own_at + size_t(slot - prefix) * D;
    }
    float k[PER_LANE], v[PER_LANE];
    for (int i = 0; i < PER_LANE; i++) {
      k[i] = static_cast<float>(key[i]);
      v[i] = static_cast<float>(value[i]);
    }
    #pragma unroll
    for (int g = 0; g < G; g++) {
      float score = 0;
      for (int i = 0; i < PER_LANE; i++) score += q[g][i] * k[i];
      score = metal::simd_sum(score);
      const float top = metal::fmax(most[g], score);
      const float keep = metal::fast::exp(most[g] - top), weight = metal::fast::exp(score - top);
      total[g] = total[g] * keep + weight;
      for (int i = 0; i < PER_LANE; i++) sum[g][i] = sum[g][i] * keep + weight * v[i];
      most[g] = top;
    }
  }

  threadgroup float tops[SIMDS], totals[SIMDS], sums[SIMDS][D];
  #pragma unroll
  for (int g = 0; g < G; g++) {  // unrolled, or what it indexes would not stay in registers
    if (lane == 0) {
      tops[simd] = most[g];
      totals[simd] = total[g];
    }
    for (int i = 0; i < PER_LANE; i++) sums[simd][part + i] = sum[g][i];
    threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    for (int d = thread_position_in_threadgroup.x; d < D; d += THREADS) {
      float top = LOWEST, all = 0, value = 0;
      for (int s = 0; s < SIMDS; s++) top = metal::fmax(top, tops[s]);
      for (int s = 0; s < SIMDS; s++) {
        const float keep = metal::fast::exp(tops[s] - top);
        all += keep * totals[s];
        value += keep * sums[s][d];
      }
      out[(size_t(row) * HEADS + head + g) * D + d] = static_cast<T>(all == 0 ? 0.f : value / all);
    }
    threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  }
"""

# A thread has a column of ROWS rows; B is (RANK, OUT), z (rows, RANK) for each layer. What stands for LAYER finds the
# layer with that column, where its columns start and how many it has, and ``to``, where they go.
ADD_LORA = """
  const int column = thread_position_in_grid.x, first = thread_position_in_grid.y * ROWS, rows = y_shape[0];
  LAYER
  float x[ROWS];
  for (int r = 0; r < ROWS; r++) x[r] = static_cast<float>(y[size_t(metal::min(first + r, rows - 1)) * WIDE + column]);
  for (int k = 0; k < RANK; k++) {
    const float weight = static_cast<float>(b[size_t(k) * OUT + column]);
    for (int r = 0; r < ROWS; r++) {
      const size_t row = metal::min(first + r, rows - 1);
      x[r] += static_cast<float>(y[row * WIDE + OUT + layer * RANK + k]) * weight;
    }
  }
  for (int r = 0; r < ROWS && first + r < rows; r++)
    to[size_t(first + r) * width + column - start] = static_cast<T>(x[r]);
"""

# A simdgroup has one head of ROWS rows. A lane has every 32nd number of it, so also the one half a head away with
# which a number is rotated. OUT numbers of y are the heads' without their LoRAs; z follows, RANK for each layer.
HEADS = """
  constexpr int PER_LANE = D / 32, HALF = PER_LANE / 2;
  const int lane = thread_index_in_simdgroup, head = thread_position_in_grid.x / 32;
  const int first = thread_position_in_grid.y * ROWS, rows = y_shape[0];
  const int layer = head < QUERIES ? 0 : head < QUERIES + KEYS ? 1 : 2, count = layer == 0 ? QUERIES : KEYS;
  const int place = layer == 0 ? head : head - QUERIES - (layer - 1) * KEYS;
  device T* to = layer == 0 ? queries : layer == 1 ? keys : values;
  float x[ROWS][PER_LANE];
  for (int r = 0; r < ROWS; r++)
    for (int i = 0; i < PER_LANE; i++)
      x[r][i] = static_cast<float>(y[size_t(metal::min(first + r, rows - 1)) * WIDE + head * D + i * 32 + lane]);
  for (int k = 0; k < RANK; k++) {
    float weight[PER_LANE];
    for (int i = 0; i < PER_LANE; i++) weight[i] = static_cast<float>(b[size_t(k) * OUT + head * D + i * 32 + lane]);
    for (int r = 0; r < ROWS; r++) {
      const size_t row = metal::min(first + r, rows - 1);
      const float z = static_cast<float>(y[row * WIDE + OUT + layer * RANK + k]);
      for (int i = 0; i < PER_LANE; i++) x[r][i] += z * weight[i];
    }
  }
  for (int r = 0; r < ROWS; r++) {
    const size_t row = metal::min(first + r, rows - 1);
    if (NORMED && layer < 2) {
      float squares = 0;
      for (int i = 0; i < PER_LANE; i++) squares += x[r][i] * x[r][i];
      const float shrink = metal::precise::rsqrt(metal::simd_sum(squares) / D + EPSILON);
      for (int i = 0; i < PER_LANE; i++) {
        const int at = i * 32 + lane;
        x[r][i] *= shrink * static_cast<float>(layer == 0 ? query_norm[at] : key_norm[at]);
      }
    }
    if (layer < 2) {
      for (int i = 0; i < HALF; i++) {
        const float cosine = cosines[row * (D / 2) + i * 32 + lane], sine = sines[row * (D / 2) + i * 32 + lane];
        const float low = x[r][i], high = x[r][i + HALF];
        x[r][i] = low * cosine - high * sine;
        x[r][i + HALF] = high * cosine + low * sine;
      }
    }
    if (first + r < rows)
      for (int i = 0; i < PER_LANE; i++)
        to[(row * count + place) * D + i * 32 + lane] = static_cast<T>(x[r][i]);
  }
"""

# A threadgroup has a row, a thread every THREADS-th column of it.
ADD_AND_NORM = """
  const int row = threadgroup_position_in_grid.x, me = thread_position_in_threadgroup.x;
  float squares = 0;
  for (int column = me; column < OUT; column += THREADS) {
    float x = static_cast<float>(y[size_t(row) * WIDE + column]);
    for (int k = 0; k < RANK; k++)
      x += static_cast<float>(y[size_t(row) * WIDE + OUT + k]) * static_cast<float>(b[size_t(k) * OUT + column]);
    const T sum = static_cast<T>(x + static_cast<float>(residual[size_t(row) * OUT + column]));
    added[size_t(row) * OUT + column] = sum;
    squares += static_cast<float>(sum) * static_cast<float>(sum);
  }
  threadgroup float parts[THREADS / 32];
  squares = metal::simd_sum(squares);
  if (thread_index_in_simdgroup == 0) parts[simdgroup_index_in_threadgroup] = squares;
  threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  squares = 0;
  for (int s = 0; s < THREADS / 32; s++) squares += parts[s];
  const float shrink = metal::precise::rsqrt(squares / OUT + EPSILON);
  for (int column = me; column < OUT; column += THREADS) {
    const float sum = static_cast<float>(added[size_t(row) * OUT + column]);  // written by this thread
    normed[size_t(row) * OUT + column] = static_cast<T>(sum * shrink * static_cast<float>(norm[column]));
  }
"""

# A thread has a column of ROWS rows.
SWIGLU = """
  constexpr int OUT = 2 * INNER;
  const int column = thread_position_in_grid.x, first = thread_position_in_grid.y * ROWS, rows = y_shape[0];
  float gate[ROWS], up[ROWS];
  for (int r = 0; r < ROWS; r++) {
    const size_t row = metal::min(first + r, rows - 1);
    gate[r] = static_cast<float>(y[row * WIDE + column]);
    up[r] = static_cast<float>(y[row * WIDE + INNER + column]);
  }
  for (int k = 0; k < RANK; k++) {
    const float gate_weight = static_cast<float>(b[size_t(k) * OUT + column]);
    const float up_weight = static_cast<float>(b[size_t(k) * OUT + INNER + column]);
    for (int r = 0; r < ROWS; r++) {
      const size_t row = metal::min(first + r, rows - 1);
      gate[r] += static_cast<float>(y[row * WIDE + OUT + k]) * gate_weight;
      up[r] += static_cast<float>(y[row * WIDE + OUT + RANK + k]) * up_weight;
    }
  }
  for (int r = 0; r < ROWS && first + r < rows; r++)
    out[size_t(first + r) * INNER + column] =
        static_cast<T>(gate[r] / (1.f + metal::precise::exp(-gate[r])) * up[r]);
"""

CHOOSE = """
// The first of the masses at which their running sum, of which ``before`` lies ahead of them, exceeds the point; if
// rounding leaves none, the last above 0. ``before`` is then what lies ahead of the chosen one.
inline int choose_mass(const threadgroup float* masses, int count, float point, thread float& before) {
  int chosen = 0;
  float running = before;
  for (int i = 0; i < count; i++) {
    if (masses[i] > 0) {
      chosen = i;
      before = running;
      running += masses[i];
      if (running > point) break;
    }
  }
  return chosen;
}
"""

# A threadgroup has a row. A simdgroup takes 256 tokens at a time and leaves their maximum m, the sum of exp(z - m)
# and the sum of exp(z - m) (z - m); from these come log-probs, entropy and the 256 to draw from.
DRAW = """
  constexpr int SIMDS = THREADS / 32, BLOCK = 256;
  const int lane = thread_index_in_simdgroup, simd = simdgroup_index_in_threadgroup;
  const int me = thread_position_in_threadgroup.x, row = threadgroup_position_in_grid.x, vocabulary = logits_shape[1];
  const size_t start = size_t(state[row]) * vocabulary;
  const float cold = 1.0f / TEMPERATURE;
  threadgroup float tops[BLOCKS], masses[BLOCKS], spreads[BLOCKS], inside[BLOCK], ahead[1];
  threadgroup int chosen[1];

  for (int n = simd; n < BLOCKS; n += SIMDS) {
    float x[BLOCK / 32], top = -INFINITY, mass = 0, spread = 0;
    for (int i = 0; i < BLOCK / 32; i++) {
      const int token = n * BLOCK + i * 32 + lane;
      x[i] = token < vocabulary ? static_cast<float>(logits[start + token]) * cold : -INFINITY;
      top = metal::fmax(top, x[i]);
    }
    top = metal::simd_max(top);
    for (int i = 0; i < BLOCK / 32; i++) {
      const float p = x[i] == -INFINITY ? 0.f : metal::precise::exp(x[i] - top);  // NaN stays NaN
      mass += p;
      spread += p > 0 ? p * (x[i] - top) : 0.f;
    }
    mass = metal::simd_sum(mass);
    spread = metal::simd_sum(spread);
    if (lane == 0) {
      tops[n] = top;
      masses[n] = mass;
      spreads[n] = spread;
    }
  }
  threadgroup_barrier(metal::mem_flags::mem_threadgroup);

  float top = -INFINITY, total = 0, spread = 0;  // of the row; each simdgroup finds them for itself
  for (int n = lane; n < BLOCKS; n += 32) top = metal::fmax(top, tops[n]);
  top = metal::simd_max(top);
  for (int n = lane; n < BLOCKS; n += 32) {
    const float weight = masses[n] == 0 ? 0.f : metal::precise::exp(tops[n] - top);
    total += weight * masses[n];
    spread += weight > 0 ? weight * (spreads[n] + (tops[n] - top) * masses[n]) : 0.f;
  }
  total = metal::simd_sum(total);
  spread = metal::simd_sum(spread);
  if (!(total > 0 && total < INFINITY)) {  // a logit is no number
    if (me == 0) {
      tokens[row] = 0;
      logprobs[row] = -INFINITY;
      entropy[row] = -INFINITY;
    }
    return;
  }
  threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  for (int n = me; n < BLOCKS; n += THREADS)
    masses[n] *= masses[n] == 0 ? 0.f : metal::precise::exp(tops[n] - top);
  threadgroup_barrier(metal::mem_flags::mem_threadgroup);

  const float point = random[row] * total;
  float before = 0;
  if (me == 0) {
    chosen[0] = choose_mass(masses, BLOCKS, point, before);
    ahead[0] = before;
  }
  threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  const int block = chosen[0] * BLOCK;
  for (int i = me; i < BLOCK; i += THREADS) {
    const float x = block + i < vocabulary ? static_cast<float>(logits[start + block + i]) * cold : -INFINITY;
    inside[i] = x == -INFINITY ? 0.f : metal::precise::exp(x - top);
  }
  threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  if (me == 0) {
    before = ahead[0];
    const int token = block + choose_mass(inside, BLOCK, point, before);
    const float log_total = metal::precise::log(total);
    tokens[row] = token;
    logprobs[row] = static_cast<float>(logits[start + token]) * cold - top - log_total;
    entropy[row] = log_total - spread / total;
  }
"""
