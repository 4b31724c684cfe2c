// Causal grouped-query attention over the paged cache, decode rows and prefill chunks alike.
//
// A row sees its keys in splits of 512, a split in tiles of 64, both counted from position 0; within a split goes an
// online softmax, and the splits' results are folded one after the other. So a row takes the same steps however the
// prompt was chunked. Short runs of queries over long contexts leave their splits to several threads, which changes who
// computes a split, never what is folded in which order.
#pragma once
#include "attention_amx.hpp"
#include "attention_plan.hpp"
#include "online_softmax.hpp"

namespace tandem {

// The rows of an item: [heads][tokens][group], a head's `pitch` behind those of the one before.
struct ItemRows {
  int heads, group, count, pitch;  // count: of a head

  ItemRows(const AttentionItem& item, int group_in)
      : heads(item.heads), group(group_in), count(item.tokens * group_in), pitch((count + kLanes - 1) / kLanes * kLanes) {}

  // Calls `work` with (token, query head, row), tokens and query heads counted from the item's first.
  void over(auto work) const {
    for (int head = 0; head < heads; head++)
      over_head([&](int token, int member, int row) { work(token, head * group + member, head * pitch + row); });
  }
  // The same for the first head.
  void over_head(auto work) const {
    for (int row = 0, token = 0; row < count; token++)
      for (int member = 0; member < group; member++, row++) work(token, member, row);
  }
};

// Rows over keys [first_key, first_key + 512) at most; the first token sits at `position`. Fills out, peak and total. The
// first tile is found already; while one is worked on the next one is asked for, at `end` that of `s.after`.
template <KvType type>
static void attend_split(const KvLayer& kv, const int32_t* table, int head, const ItemRows& rows, int position,
                         int first_key, int end, AttentionScratch& s) {
  for (int h = 0; h < rows.heads; h++)
    std::fill_n(&s.out[static_cast<size_t>(h) * rows.pitch * s.dim], static_cast<size_t>(rows.count) * s.dim, 0.0f);
  std::fill_n(s.peak.begin(), rows.heads * rows.pitch, -INFINITY);
  std::fill_n(s.total.begin(), rows.heads * rows.pitch, 0.0f);
  TileProducts<kPaired<type>> products{s, rows.count, kv.head_dim};
  for (int first = first_key; first < std::min(end, first_key + kSplitKeys); first += kTileKeys) {
    const int next = first + kTileKeys;
    const TileRows& tile = s.tiles[s.turn];
    TileRows& upcoming = s.tiles[s.turn ^= 1];
    if (next < end) upcoming.find(kv, table, head, rows.heads, next, std::min(end - next, kTileKeys));
    Ahead ahead(next < end ? upcoming : s.after);
    rows.over_head(
        [&](int token, int, int row) { s.visible[row] = std::min(position + token + 1 - first, tile.count); });
    for (int h = 0; h < rows.heads; h++) {
      load_tile<type>(tile, h, rows.heads, kv.head_dim, s, ahead);
      products.score(h * rows.pitch, tile.count);
      soften<type>(s, rows.count, h * rows.pitch);
      products.weigh(h * rows.pitch, tile.count);
    }
  }
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
static void attend(const KvLayer& kv, const Batch& batch, const AttentionItem& item, const ItemRows& rows,
                   AttentionScratch& s) {
  const int position = item.position(batch);
  const int32_t* table = batch.tables + int64_t{item.sequence} * batch.table_width;
  const Range keys = item.keys(batch);
  for (int first = keys.begin; first < keys.end; first += kSplitKeys) {
    attend_split<type>(kv, table, item.head, rows, position, first, keys.end, s);
    if (first == keys.begin) {
      s.all_out.swap(s.out);
      s.all_peak.swap(s.peak);
      s.all_total.swap(s.total);
      continue;
    }
    rows.over([&](int token, int, int row) {
      if (position + token >= first)
        fold(&s.all_out[static_cast<size_t>(row) * s.dim], &s.all_peak[row], &s.all_total[row],
             &s.out[static_cast<size_t>(row) * s.dim], s.peak[row], s.total[row], s.dim);
    });
  }
}

// The first tile of an item, if there is one.
TANDEM_INLINE void find_first(const KvLayer& kv, const Batch& batch, const AttentionItem* item, TileRows& tile) {
  tile.count = 0;
  if (item == nullptr) return;
  const Range keys = item->keys(batch);
  tile.find(kv, batch.tables + int64_t{item->sequence} * batch.table_width, item->head, item->heads, keys.begin,
            std::min(keys.end - keys.begin, kTileKeys));
}

// Takes items until there are none left. `query` is [T][heads][head_dim]; `out`, of that shape, receives what is not
// split. Threads then meet, and `merge_attention` completes it.
static void paged_attention(const KvLayer& kv, const Batch& batch, AttentionPlan& plan, const float* query, int heads,
                            float scale, float* out, AttentionScratch& s) {
  const int group = heads / kv.kv_heads, head_dim = kv.head_dim;
  s.reserve(AttentionPlan::most_rows(group), head_dim);
  scale *= kLog2E;
  const bool paired = kv.type == KvType::i8 ? kPaired<KvType::i8> : kv.type == KvType::bf16 && kPaired<KvType::bf16>;
  const AttentionItem* later;
  for (const AttentionItem* item = plan.take(); item != nullptr; item = later ? later : plan.take()) {
    later = plan.take_early();
    find_first(kv, batch, item, s.tiles[s.turn]);
    find_first(kv, batch, later, s.after);
    const ItemRows rows(*item, group);
    const int first_head = item->head * group;
    const auto place = [&](int token, int head) {  // of a row in query and out
      return (int64_t{item->token + token} * heads + first_head + head) * head_dim;
    };
    rows.over([&](int token, int head, int row) {
      load_query(query + place(token, head), head_dim, scale, paired, s.dim, &s.query[static_cast<size_t>(row) * s.dim]);
    });
    if (kv.type == KvType::f32)
      attend<KvType::f32>(kv, batch, *item, rows, s);
    else if (kv.type == KvType::bf16)
      attend<KvType::bf16>(kv, batch, *item, rows, s);
    else
      attend<KvType::i8>(kv, batch, *item, rows, s);
    rows.over([&](int token, int head, int row) {
      const float* from = &s.all_out[static_cast<size_t>(row) * s.dim];
      if (item->split < 0) return normalise_row(from, s.all_total[row], head_dim, out + place(token, head));
      float* to = plan.partial(batch, item->sequence, item->split, item->token + token, first_head + head);
      std::memcpy(to, from, sizeof(float) * s.dim);
      to[s.dim] = s.all_peak[row];
      to[s.dim + 1] = s.all_total[row];
    });
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
