// Causal grouped-query attention over the paged cache, decode rows and prefill chunks alike.
//
// A row sees its keys in splits of 512, a split in tiles of 64, both counted from position 0; within a split goes an
// online softmax, and the splits' results are folded one after the other. So a row takes the same steps however the
// prompt was chunked. Short runs of queries over long contexts leave their splits to several threads, which changes who
// computes a split, never what is folded in which order.
#pragma once
#include "attention_amx.hpp"
#include "attention_plan.hpp"

namespace tandem {

// Turns a row's scores into weights relative to the new peak and rescales what was summed so far. `visible` of the tile's
// keys are the row's to see.
template <KvType type>
TANDEM_INLINE void soften(AttentionScratch& s, int row, int visible) {
  constexpr int kVecs = kTileKeys / kLanes;
  constexpr bool scaled = kPaired<type> && type == KvType::i8;
  float* scores = &s.scores[static_cast<size_t>(row) * kTileKeys];
  if (visible <= 0) {
    std::memset(scores, 0, sizeof(float) * kTileKeys);
    return;
  }
  Vec score[kVecs];
  for (int v = 0; v < kVecs; v++) score[v] = load(scores + v * kLanes);
  if constexpr (scaled)
    for (int v = 0; v < kVecs; v++) score[v] *= load(&s.key_scales[v * kLanes]);
  if (visible < kTileKeys)
    for (int v = 0; v < kVecs; v++) score[v] = lane_numbers() < visible - v * kLanes ? score[v] : splat(-INFINITY);
  Vec top = score[0];
  for (int v = 1; v < kVecs; v++) top = max(top, score[v]);
  const float before = s.peak[row], now = largest(top), peak = now > before ? now : before;
  Vec sums{};
  for (int v = 0; v < kVecs; v++) {
    const Vec weight = exp(score[v] - peak);
    score[v] = score[v] > splat(-INFINITY) ? weight : Vec{};
    sums += score[v];
    if constexpr (scaled) score[v] *= load(&s.value_scales[v * kLanes]);
  }
#if defined(__AVX512BF16__)
  if constexpr (kPaired<type>)
    for (int v = 0; v < kVecs; v += 2) store_pairs(scores + v * kLanes / 2, score[v], score[v + 1]);
#endif
  if constexpr (!kPaired<type>)
    for (int v = 0; v < kVecs; v++) store(scores + v * kLanes, score[v]);
  if (peak != before) {
    const float shrink = exp(splat(before - peak))[0];
    s.total[row] *= shrink;
    float* out = &s.out[static_cast<size_t>(row) * s.dim];
    for (int d = 0; d < s.dim; d += kLanes) store(out + d, load(out + d) * shrink);
  }
  s.peak[row] = peak;
  s.total[row] += sum(sums);
}

// Rows [tokens][group] over keys [first_key, first_key + 512) at most; the first token sits at `position`. Fills out,
// peak and total. The first tile is found already; while one is loaded the next one is asked for, at `end` that of `s.after`.
template <KvType type>
static void attend_split(const KvLayer& kv, const int32_t* table, int head, int rows, int group, int position,
                         int first_key, int end, AttentionScratch& s) {
  std::fill_n(s.out.begin(), static_cast<size_t>(rows) * s.dim, 0.0f);
  std::fill_n(s.peak.begin(), rows, -INFINITY);
  std::fill_n(s.total.begin(), rows, 0.0f);
  TileProducts<kPaired<type>> products{s, rows, kv.head_dim};
  for (int first = first_key; first < std::min(end, first_key + kSplitKeys); first += kTileKeys) {
    const int next = first + kTileKeys, count = s.tiles[s.turn].count;
    TileRows& upcoming = s.tiles[s.turn ^ 1];
    if (next < end) upcoming.find(kv, table, head, next, std::min(end - next, kTileKeys));
    load_tile<type>(s.tiles[s.turn], next < end ? upcoming : s.after, kv.head_dim, s);
    products.score(count);
    for (int row = 0; row < rows; row++) soften<type>(s, row, std::min(position + row / group + 1 - first, count));
    products.weigh(count);
    s.turn ^= 1;
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

// A query row, scaled; of pairs, if they are wanted.
TANDEM_INLINE void load_query(const float* from, int head_dim, float scale, bool paired, int dim, float* to) {
  for (int d = 0; d < head_dim; d++) to[d] = from[d] * scale;
  for (int d = head_dim; d < dim; d++) to[d] = 0.0f;
#if defined(__AVX512BF16__)
  if (paired)
    for (int d = 0; d < dim; d += 32) store_pairs(to + d / 2, load(to + d), load(to + d + 16));
#endif
}

// One item; leaves rows in all_out, all_peak, all_total, over all splits or the item's own.
template <KvType type>
static void attend(const KvLayer& kv, const Batch& batch, const AttentionItem& item, int group, AttentionScratch& s) {
  const int rows = item.tokens * group, position = item.position(batch);
  const int32_t* table = batch.tables + int64_t{item.sequence} * batch.table_width;
  const Range keys = item.keys(batch);
  for (int first = keys.begin; first < keys.end; first += kSplitKeys) {
    attend_split<type>(kv, table, item.head, rows, group, position, first, keys.end, s);
    if (first == keys.begin) {
      s.all_out.swap(s.out);
      s.all_peak.swap(s.peak);
      s.all_total.swap(s.total);
      continue;
    }
    for (int row = 0; row < rows; row++)
      if (position + row / group >= first)
        fold(&s.all_out[static_cast<size_t>(row) * s.dim], &s.all_peak[row], &s.all_total[row],
             &s.out[static_cast<size_t>(row) * s.dim], s.peak[row], s.total[row], s.dim);
  }
}

// The first tile of an item, if there is one.
TANDEM_INLINE void find_first(const KvLayer& kv, const Batch& batch, const AttentionItem* item, TileRows& tile) {
  tile.count = 0;
  if (item == nullptr) return;
  const Range keys = item->keys(batch);
  tile.find(kv, batch.tables + int64_t{item->sequence} * batch.table_width, item->head, keys.begin,
            std::min(keys.end - keys.begin, kTileKeys));
}

// Takes items until there are none left. `query` is [T][heads][head_dim]; `out`, of that shape, receives what is not
// split. Threads then meet, and `merge_attention` completes it.
static void paged_attention(const KvLayer& kv, const Batch& batch, AttentionPlan& plan, const float* query, int heads,
                            float scale, float* out, AttentionScratch& s) {
  const int group = heads / kv.kv_heads, head_dim = kv.head_dim;
  s.reserve(AttentionPlan::run_tokens(group) * group, head_dim);
  const bool paired = kv.type == KvType::i8 ? kPaired<KvType::i8> : kv.type == KvType::bf16 && kPaired<KvType::bf16>;
  const AttentionItem* later;
  for (const AttentionItem* item = plan.take(); item != nullptr; item = later ? later : plan.take()) {
    later = plan.take_early();
    find_first(kv, batch, item, s.tiles[s.turn]);
    find_first(kv, batch, later, s.after);
    const int rows = item->tokens * group, first_head = item->head * group;
    for (int r = 0; r < rows; r++)
      load_query(query + (int64_t{item->token + r / group} * heads + first_head + r % group) * head_dim, head_dim, scale,
                 paired, s.dim, &s.query[static_cast<size_t>(r) * s.dim]);
    if (kv.type == KvType::f32)
      attend<KvType::f32>(kv, batch, *item, group, s);
    else if (kv.type == KvType::bf16)
      attend<KvType::bf16>(kv, batch, *item, group, s);
    else
      attend<KvType::i8>(kv, batch, *item, group, s);
    for (int r = 0; r < rows; r++) {
      const float* from = &s.all_out[static_cast<size_t>(r) * s.dim];
      const int token = item->token + r / group, head = first_head + r % group;
      if (item->split < 0) {
        normalise_row(from, s.all_total[r], head_dim, out + (static_cast<int64_t>(token) * heads + head) * head_dim);
        continue;
      }
      float* to = plan.partial(batch, item->sequence, item->split, token, head);
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
