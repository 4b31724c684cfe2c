// What is to be attended to in a step, cut into items that threads take one after the other.
#pragma once
#include <atomic>
#include <vector>

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

  // Of the first token.
  int position(const Batch& batch) const { return batch.seq_lens[sequence] - (batch.query_start[sequence + 1] - token); }
  Range keys(const Batch& batch) const {
    const int end = position(batch) + tokens;
    return split < 0 ? Range{0, end} : Range{split * kSplitKeys, std::min(end, (split + 1) * kSplitKeys)};
  }
};

// Who has what to do in a step; the same for all layers.
class AttentionPlan {
 public:
  std::vector<AttentionItem> items;
  std::vector<float> partials;  // rows of `row_floats`

  void prepare(const Batch& batch, int heads, int kv_heads, int head_dim, int threads) {
    heads_ = heads;
    threads_ = threads;
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
    rewind();
  }

  // All items are to be taken once more.
  void rewind() { next_.store(0, std::memory_order_relaxed); }
  const AttentionItem* take() {
    const size_t ticket = next_.fetch_add(1, std::memory_order_relaxed);
    return ticket < items.size() ? &items[ticket] : nullptr;
  }
  // An item for later, as long as enough are left for the others to come to their share.
  const AttentionItem* take_early() {
    return next_.load(std::memory_order_relaxed) + 2 * threads_ < static_cast<int>(items.size()) ? take() : nullptr;
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
  std::atomic<int> next_{0};  // ticket
  int heads_ = 0, row_floats_ = 0, threads_ = 1;
  std::vector<int64_t> first_row_;
};

}  // namespace tandem
