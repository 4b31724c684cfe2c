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
// Few rows, of one token mostly, take the heads together: keys and values of a token's heads lie side by side, and memory
// is read faster in its order. Where that left a thread fewer items than these they are taken one by one.
inline constexpr int kJoinedItems = 4;

struct Batch {
  int num_tokens, num_sequences, table_width;
  const int64_t *positions, *slots;
  const int32_t *tables, *query_start, *seq_lens;
};

// A run of query tokens of one sequence under some KV heads, and the keys it attends to: all, or one split of them.
struct AttentionItem {
  int sequence, token, tokens, head, heads, split;  // split -1: all

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
    kv_heads_ = kv_heads;
    threads_ = threads;
    row_floats_ = padded_dim(head_dim) + 2;
    const int group = heads / kv_heads, run = run_tokens(group);
    int64_t rows = 0, few_rows = 0;
    for (int seq = 0; seq < batch.num_sequences; seq++)
      if (is_few((batch.query_start[seq + 1] - batch.query_start[seq]) * group)) few_rows += splits_of(batch, seq);
    joined_ = few_rows >= kJoinedItems * threads ? joined_heads(kv_heads) : 1;
    items.clear();
    first_row_.assign(batch.num_sequences, -1);
    for (int seq = 0; seq < batch.num_sequences; seq++) {
      const int begin = batch.query_start[seq], end = batch.query_start[seq + 1], splits = splits_of(batch, seq);
      if (splits > 1 && end - begin <= run) {
        first_row_[seq] = rows;
        rows += static_cast<int64_t>(splits) * (end - begin) * heads;
        for (int split = 0; split < splits; split++) add(seq, begin, end - begin, split);
        continue;
      }
      for (int last = (end - begin + run - 1) / run - 1; last >= 0; last--) {  // those with the most keys first, for balance
        const int token = begin + last * run;
        add(seq, token, std::min(run, end - token), -1);
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
  // The most rows that an item takes, a head of joined ones as many as kLanes.
  static int most_rows(int group) { return std::max(kTileRows, run_tokens(group) * group); }

  bool is_split(int seq) const { return first_row_[seq] >= 0; }

  // [dim] unnormalised output, then peak and total, of one split, token and query head of a split sequence.
  float* partial(const Batch& batch, int seq, int split, int token, int head) {
    int begin = batch.query_start[seq], count = batch.query_start[seq + 1] - begin;
    int64_t row = first_row_[seq] + (static_cast<int64_t>(split) * count + token - begin) * heads_ + head;
    return &partials[static_cast<size_t>(row) * row_floats_];
  }

 private:
  static bool is_few(int rows) { return rows <= kLanes; }
  static int splits_of(const Batch& batch, int seq) { return (batch.seq_lens[seq] + kSplitKeys - 1) / kSplitKeys; }
  // As many as fit, in equal parts.
  static int joined_heads(int kv_heads) {
    const int parts = (kv_heads * kLanes + kTileRows - 1) / kTileRows;
    return (kv_heads + parts - 1) / parts;
  }

  void add(int seq, int token, int tokens, int split) {
    const int step = is_few(tokens * (heads_ / kv_heads_)) ? joined_ : 1;
    for (int head = 0; head < kv_heads_; head += step)
      items.push_back({seq, token, tokens, head, std::min(step, kv_heads_ - head), split});
  }

  std::atomic<int> next_{0};  // ticket
  int heads_ = 0, kv_heads_ = 0, row_floats_ = 0, threads_ = 1;
  int joined_ = 1;  // heads of an item that has few rows
  std::vector<int64_t> first_row_;
};

}  // namespace tandem
