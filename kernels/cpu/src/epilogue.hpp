// What becomes of a matrix multiplication's results. An epilogue gets them a block of rows at a time, while they are in
// the first cache, for one group of outputs after the other:
//
//     int groups() const                     how many there are; threads share them
//     Spans spans(int group) const           the outputs that a group is made of
//     void rows(int group, Range tokens, Results first, Results second) const      the outputs of each span
#pragma once
#include "elementwise.hpp"
#include "kv_layer.hpp"
#include "rows.hpp"
#include "team.hpp"

namespace tandem {

struct Spans {
  Range first, second;  // the second may be empty
};

// Rows of floats, `pitch` apart.
struct Results {
  float* first;
  long pitch;

  float* row(int i) const { return first + i * pitch; }
  Results from(int column) const { return {first + column, pitch}; }
};

// Stores them in out [rows][outputs], or adds them, a panel at a time.
struct StoreRows {
  int outputs;
  float* out;
  bool add;

  int groups() const { return (outputs + kPanel - 1) / kPanel; }
  Spans spans(int group) const { return {{group * kPanel, std::min((group + 1) * kPanel, outputs)}, {0, 0}}; }
  void rows(int group, Range tokens, Results values, Results) const {
    const int width = std::min(kPanel, outputs - group * kPanel);
    float* to = out + static_cast<size_t>(tokens.begin) * outputs + group * kPanel;
    for (int i = 0; i < tokens.end - tokens.begin; i++, to += outputs) {
      const float* row = values.row(i);
      int n = 0;
      for (; n + kLanes <= width; n += kLanes) store(to + n, add ? load(to + n) + load(row + n) : load(row + n));
      for (; n < width; n++) to[n] = add ? to[n] + row[n] : row[n];
    }
  }
};

// silu(gate) * up of outputs [gates, ups] -> packed input rows of the weight that follows. A group of 64, because some
// formats round so many together.
struct GateRows {
  const Geometry& next;  // its inputs are as many as gates
  uint32_t* packed;

  int groups() const { return next.groups; }
  Spans spans(int group) const {
    const int begin = group * kGroup, end = std::min(begin + kGroup, next.inputs);
    return {{begin, end}, {next.inputs + begin, next.inputs + end}};
  }
  void rows(int group, Range tokens, Results gates, Results ups) const {
    const int count = std::min(kGroup, next.inputs - group * kGroup);
    with_format(next.format, [&](auto format) {
      for (int t = tokens.begin; t < tokens.end; t++) {
        alignas(64) float gated[kGroup];
        silu_and_mul(gates.row(t - tokens.begin), ups.row(t - tokens.begin), count, gated);
        pack_group<format()>(next, gated, count, t, group, packed);
      }
    });
  }
};

// Heads of outputs [queries, keys, values], one at a time: normalised where the architecture does, rotated; keys and
// values go to the cache.
struct HeadRows {
  int heads;
  const KvLayer& kv;
  const float *query_norm, *key_norm;  // or null
  float eps;
  const float* cos_sin;                 // [positions][head_dim]
  const int64_t *positions, *slots;     // of the rows; slot -1: nothing is kept
  float* query;                         // [rows][heads][head_dim]

  int groups() const { return heads + 2 * kv.kv_heads; }
  Spans spans(int group) const { return {{group * kv.head_dim, (group + 1) * kv.head_dim}, {0, 0}}; }
  void rows(int group, Range tokens, Results values, Results) const {
    for (int t = tokens.begin; t < tokens.end; t++) row(group, t, values.row(t - tokens.begin));
  }

 private:
  void row(int group, int t, float* values) const {
    const int dim = kv.head_dim, head = group - heads;
    if (head < kv.kv_heads) {
      if (const float* norm = head < 0 ? query_norm : key_norm) rms_norm(values, norm, dim, eps, values);
      rotate(values, cos_sin + positions[t] * dim, dim);
    }
    if (head < 0)
      std::copy_n(values, dim, query + (static_cast<size_t>(t) * heads + group) * dim);
    else if (slots[t] >= 0)
      write_head(kv, slots[t], head >= kv.kv_heads, head % kv.kv_heads, values);
  }
};

}  // namespace tandem
