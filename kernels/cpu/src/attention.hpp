// Causal grouped-query attention over the paged cache, decode rows and prefill chunks alike.
//
// A row sees its keys in splits of 512, a split in tiles of 64, both counted from position 0; within a split goes an
// online softmax, and the splits' results are folded one after the other. So a row takes the same steps however the
// prompt was chunked. Short runs of queries over long contexts leave their splits to several threads, which changes who
// computes a split, never what is folded in which order.
#pragma once
#include <atomic>

#include "attention_tile.hpp"
#include "team.hpp"

namespace tandem {

// Query rows that share a tile of keys, if the group is not larger: a tile is brought into its form once for all of them.
// 512 tokens of 9 heads on a Zen 3: 82 GFLOP/s in bfloat16 instead of 65 with 32 rows; 128 leave the first cache.
inline constexpr int kTileRows = 96;
inline constexpr int kSplitKeys = 512;

struct Batch {
  int num_tokens, num_sequences, table_width;
  const int64_t *positions, *slots;
  const int32_t *tables, *query_start, *seq_lens;
};

// A run of query tokens of one sequence under one KV head, and the keys it attends to: all, or one split of them.
struct AttentionItem {
  int sequence, token, tokens, head, split;  // split -1: all
};

// Who has what to do in a step; the same for all layers.
class AttentionPlan {
 public:
  std::vector<AttentionItem> items;
  std::vector<float> partials;  // rows of `row_floats`
  std::atomic<int> next{0};     // ticket of the next item

  void prepare(const Batch& batch, int heads, int kv_heads, int head_dim) {
    heads_ = heads;
    row_floats_ = padded_dim(head_dim) + 2;
    const int run = run_tokens(heads / kv_heads);
    int64_t rows = 0;
    items.clear();
    first_row_.assign(batch.num_sequences, -1);
    for (int seq = 0; seq < batch.num_sequences; seq++) {
      int begin = batch.query_start[seq], end = batch.query_start[seq + 1];
      int splits = (batch.seq_lens[seq] + kSplitKeys - 1) / kSplitKeys;
      if (splits > 1 && end - begin <= run) {
        first_row_[seq] = rows;
        rows += static_cast<int64_t>(splits) * (end - begin) * heads;
        for (int split = 0; split < splits; split++)
          for (int head = 0; head < kv_heads; head++) items.push_back({seq, begin, end - begin, head, split});
        continue;
      }
      for (int last = (end - begin + run - 1) / run - 1; last >= 0; last--) {  // those with the most keys first, for balance
        int token = begin + last * run;
        for (int head = 0; head < kv_heads; head++) items.push_back({seq, token, std::min(run, end - token), head, -1});
      }
    }
    partials.resize(static_cast<size_t>(rows) * row_floats_);
    next.store(0, std::memory_order_relaxed);
  }

  static int run_tokens(int group) { return kTileRows / group > 0 ? kTileRows / group : 1; }

  bool is_split(int seq) const { return first_row_[seq] >= 0; }

  // [dim] unnormalised output, then peak and total, of one split, token and query head of a split sequence.
  float* partial(const Batch& batch, int seq, int split, int token, int head) {
    int begin = batch.query_start[seq], count = batch.query_start[seq + 1] - begin;
    int64_t row = first_row_[seq] + (static_cast<int64_t>(split) * count + token - begin) * heads_ + head;
    return &partials[static_cast<size_t>(row) * row_floats_];
  }

 private:
  int heads_ = 0, row_floats_ = 0;
  std::vector<int64_t> first_row_;
};

// Turns a row's scores into weights relative to the new peak and rescales what was summed so far.
template <KvType type>
TANDEM_INLINE void soften(AttentionScratch& s, int row, int visible) {
  float* scores = &s.scores[static_cast<size_t>(row) * kTileKeys];
  if (visible <= 0) {
    std::memset(scores, 0, sizeof(float) * kTileKeys);
    return;
  }
  if constexpr (kPaired<type> && type == KvType::i8)
    for (int j = 0; j < kTileKeys; j += kLanes) store(scores + j, load(scores + j) * load(&s.key_scales[j]));
  for (int j = visible; j < kTileKeys; j++) scores[j] = -INFINITY;
  Vec top = load(scores);
  for (int j = kLanes; j < kTileKeys; j += kLanes) top = max(top, load(scores + j));
  float before = s.peak[row], peak = largest(top);
  peak = peak > before ? peak : before;
  Vec sums{};
  for (int j = 0; j < kTileKeys; j += kLanes) {
    Vec score = load(scores + j);
    Vec weight = exp(score - peak);
    weight = score > splat(-INFINITY) ? weight : Vec{};
    sums += weight;
    if constexpr (kPaired<type> && type == KvType::i8) weight *= load(&s.value_scales[j]);
    store(scores + j, weight);
  }
#if defined(__AVX512BF16__)
  if constexpr (kPaired<type>)
    for (int j = 0; j < kTileKeys; j += 32)  // in place: words of pairs
      _mm512_storeu_si512(scores + j / 2, (__m512i)_mm512_cvtne2ps_pbh((__m512)load(scores + j + 16), (__m512)load(scores + j)));
#endif
  if (peak != before) {
    float shrink = exp(splat(before - peak))[0];
    s.total[row] *= shrink;
    float* out = &s.out[static_cast<size_t>(row) * s.dim];
    for (int d = 0; d < s.dim; d += kLanes) store(out + d, load(out + d) * shrink);
  }
  s.peak[row] = peak;
  s.total[row] += sum(sums);
}

// Calls `work` with (number of rows as a constant, first row) for blocks of kRowBlock rows and a smaller rest.
template <int kRows = kRowBlock, typename Work>
TANDEM_INLINE void for_row_blocks(int rows, Work work, int row = 0) {
  for (; row + kRows <= rows; row += kRows) work(std::integral_constant<int, kRows>{}, row);
  if constexpr (kRows > 1) for_row_blocks<kRows - 1>(rows, work, row);
}

// Rows [tokens][group] over keys [first_key, first_key + 512) at most; the first token sits at `position`. Fills out,
// peak and total.
template <KvType type>
static void attend_split(const KvLayer& kv, const int32_t* table, int head, int rows, int group, int position,
                         int first_key, AttentionScratch& s) {
  constexpr bool paired = kPaired<type>;
  std::fill_n(s.out.begin(), static_cast<size_t>(rows) * s.dim, 0.0f);
  std::fill_n(s.peak.begin(), rows, -INFINITY);
  std::fill_n(s.total.begin(), rows, 0.0f);
  const int last_key = std::min(position + (rows - 1) / group + 1, first_key + kSplitKeys);
  const int dim = s.dim, units = paired ? (kv.head_dim + 1) / 2 : kv.head_dim;
  float *query = s.query.data(), *scores = s.scores.data(), *out = s.out.data();
  const float *keys = s.keys.data(), *values = s.values.data();
  const int64_t row_bytes = kv.row_bytes();
  TileRows tiles[2];
  tiles[0].find(kv, table, head, first_key, std::min(last_key - first_key, kTileKeys));
  for (int first = first_key, tile = 0; first < last_key; first += kTileKeys, tile ^= 1) {
    int count = std::min(last_key - first, kTileKeys), next = std::min(last_key - first - count, kTileKeys);
    int columns = (count + kScoreVecs * kLanes - 1) / (kScoreVecs * kLanes) * (kScoreVecs * kLanes);
    int value_units = paired ? (count + 1) / 2 : count;
    load_tile<type>(tiles[tile], count, kv.head_dim, s);
    tiles[tile ^ 1].find(kv, table, head, first + count, next);
    const TileRows& ahead = tiles[tile ^ 1];  // fetched a quarter at a time: more at once would hold up the work
    prefetch_rows(ahead.key, next / 2, row_bytes);
    for_row_blocks(rows, [&](auto count_of, int r) {
      score_rows<paired, count_of()>(query + r * dim, dim, keys, units, columns, scores + r * kTileKeys);
    });
    prefetch_rows(ahead.key + next / 2, next - next / 2, row_bytes);
    for (int row = 0; row < rows; row++) soften<type>(s, row, std::min(position + row / group + 1 - first, count));
    prefetch_rows(ahead.value, next / 2, row_bytes);
    for_row_blocks(rows, [&](auto count_of, int r) {
      weigh_rows<paired, count_of()>(scores + r * kTileKeys, values, value_units, dim, out + r * dim);
    });
    prefetch_rows(ahead.value + next / 2, next - next / 2, row_bytes);
  }
}

// Folds a later split into what the earlier ones gave; one function, so that all callers round alike.
__attribute__((noinline)) static void fold(float* all_out, float* all_peak, float* all_total, const float* out,
                                           float peak, float total, int dim) {
  float top = peak > *all_peak ? peak : *all_peak;
  float keep = exp(splat(*all_peak - top))[0], add = exp(splat(peak - top))[0];
  for (int d = 0; d < dim; d += kLanes) store(all_out + d, load(all_out + d) * keep + load(out + d) * add);
  *all_total = *all_total * keep + total * add;
  *all_peak = top;
}

__attribute__((noinline)) static void normalise_row(const float* from, float total, int head_dim, float* to) {
  float inverse = 1.0f / total;
  for (int d = 0; d < head_dim; d++) to[d] = from[d] * inverse;
}

TANDEM_INLINE void load_query(const float* from, int head_dim, float scale, bool paired, int dim, float* to) {
  for (int d = 0; d < head_dim; d++) to[d] = from[d] * scale;
  for (int d = head_dim; d < dim; d++) to[d] = 0.0f;
  if (!paired) return;
  uint32_t* pairs = reinterpret_cast<uint32_t*>(to);
  for (int d = 0; d < dim; d += 2) {
    uint32_t pair = to_bf16(to[d]) | static_cast<uint32_t>(to_bf16(to[d + 1])) << 16;
    pairs[d / 2] = pair;
  }
}

// One item; leaves rows in all_out, all_peak, all_total, over all splits or the item's own.
template <KvType type>
static void attend(const KvLayer& kv, const int32_t* table, const AttentionItem& item, int group, int position,
                   AttentionScratch& s) {
  const int rows = item.tokens * group, length = position + item.tokens;
  int split = item.split < 0 ? 0 : item.split, end = item.split < 0 ? (length + kSplitKeys - 1) / kSplitKeys : split + 1;
  for (int first = split; split < end; split++) {
    attend_split<type>(kv, table, item.head, rows, group, position, split * kSplitKeys, s);
    if (split == first) {
      s.all_out.swap(s.out);
      s.all_peak.swap(s.peak);
      s.all_total.swap(s.total);
      continue;
    }
    for (int row = 0; row < rows; row++)
      if (position + row / group >= split * kSplitKeys)
        fold(&s.all_out[static_cast<size_t>(row) * s.dim], &s.all_peak[row], &s.all_total[row],
             &s.out[static_cast<size_t>(row) * s.dim], s.peak[row], s.total[row], s.dim);
  }
}

// Takes items until there are none left. `query` is [T] rows `query_stride` apart of [heads][head_dim] float32; `out`
// [T][heads][head_dim] receives what is not split. Threads then meet, and `merge_attention` completes it.
static void paged_attention(const KvLayer& kv, const Batch& batch, AttentionPlan& plan, const float* query,
                            int64_t query_stride, int heads, float scale, float* out, AttentionScratch& s) {
  const int group = heads / kv.kv_heads, head_dim = kv.head_dim;
  s.reserve(AttentionPlan::run_tokens(group) * group, head_dim);
  const bool paired = kv.type == KvType::i8 ? kPaired<KvType::i8> : kv.type == KvType::bf16 && kPaired<KvType::bf16>;
  for (int ticket; (ticket = plan.next.fetch_add(1, std::memory_order_relaxed)) < static_cast<int>(plan.items.size());) {
    const AttentionItem& item = plan.items[ticket];
    const int rows = item.tokens * group, first_head = item.head * group;
    for (int r = 0; r < rows; r++)
      load_query(query + (item.token + r / group) * query_stride + (first_head + r % group) * head_dim, head_dim, scale,
                 paired, s.dim, &s.query[static_cast<size_t>(r) * s.dim]);
    const int32_t* table = batch.tables + static_cast<int64_t>(item.sequence) * batch.table_width;
    int position = batch.seq_lens[item.sequence] - (batch.query_start[item.sequence + 1] - item.token);
    if (kv.type == KvType::f32)
      attend<KvType::f32>(kv, table, item, group, position, s);
    else if (kv.type == KvType::bf16)
      attend<KvType::bf16>(kv, table, item, group, position, s);
    else
      attend<KvType::i8>(kv, table, item, group, position, s);
    for (int r = 0; r < rows; r++) {
      const float* from = &s.all_out[static_cast<size_t>(r) * s.dim];
      int token = item.token + r / group, head = first_head + r % group;
      if (item.split < 0) {
        normalise_row(from, s.all_total[r], head_dim, out + (static_cast<int64_t>(token) * heads + head) * head_dim);
        continue;
      }
      float* to = plan.partial(batch, item.sequence, item.split, token, head);
      std::memcpy(to, from, sizeof(float) * s.dim);
      to[s.dim] = s.all_peak[r];
      to[s.dim + 1] = s.all_total[r];
    }
  }
}

// Folds the splits of tokens `mine` into `out`; overwrites their partial results. Any thread may take any tokens.
static void merge_attention(const Batch& batch, AttentionPlan& plan, Range mine, int heads, int head_dim, float* out) {
  const int dim = padded_dim(head_dim);
  for (int seq = 0; seq < batch.num_sequences; seq++) {
    if (!plan.is_split(seq)) continue;
    int end = std::min(batch.query_start[seq + 1], mine.end);
    for (int token = std::max(batch.query_start[seq], mine.begin); token < end; token++) {
      int position = batch.seq_lens[seq] - (batch.query_start[seq + 1] - token);
      for (int head = 0; head < heads; head++) {
        float* all = plan.partial(batch, seq, 0, token, head);
        for (int split = 1; split * kSplitKeys <= position; split++) {
          const float* next = plan.partial(batch, seq, split, token, head);
          fold(all, all + dim, all + dim + 1, next, next[dim], next[dim + 1], dim);
        }
        normalise_row(all, all[dim + 1], head_dim, out + (static_cast<int64_t>(token) * heads + head) * head_dim);
      }
    }
  }
}

}  // namespace tandem
