// A whole decoder step: every thread walks the layers, a barrier between phases that depend on each other.
//
// The residual stream is float32 from the embedding to the head. Inputs of a matrix multiplication are rounded to the
// type of its weight, keys and values to the type of the cache.
#pragma once
#include <algorithm>

#include "attention.hpp"
#include "elementwise.hpp"
#include "linear.hpp"

namespace tandem {

// Mirrored by `DecoderShape` in decoder_step.py.
struct DecoderShape {
  int32_t hidden, heads, kv_heads, head_dim, intermediate, num_layers;
  float eps, scale;
  int32_t type;  // of the embedding
};

// Mirrored by `LayerPointers` in decoder_step.py; norms are float32, head norms null where the architecture has none.
struct LayerPointers {
  const float* attention_norm;
  const Linear* qkv;
  const float *query_norm, *key_norm;
  const Linear* output;
  const float* feed_forward_norm;
  const Linear *gate_up, *down;
};

class Decoder {
 public:
  // Everything pointed to outlives the decoder, which copies nothing but the pointers.
  Decoder(const DecoderShape& shape, const LayerPointers* layers, const void* embedding, const float* cos_sin)
      : shape_(shape),
        layers_(layers, layers + shape.num_layers),
        embedding_(embedding),
        cos_sin_(cos_sin),
        qkv_width_((shape.heads + 2 * shape.kv_heads) * shape.head_dim) {
    for (const LayerPointers& layer : layers_)
      for (const Linear* linear : {layer.qkv, layer.output, layer.gate_up, layer.down})
        packed_width_ = std::max(packed_width_, linear->row_words);
  }

  // Computes the step; `hidden` [T, hidden] receives the stream before the final norm.
  // `kv_layers` are the layers' bases in the arena, whose blocks are `block_stride` bytes apart.
  // Once another thread made `*unwanted` other than 0 it ends before the next layer: false, and nothing of it counts.
  bool step(Team& team, const Batch& batch, const int64_t* token_ids, KvType kv_type, uint8_t* const* kv_layers,
            int64_t block_stride, int block_size, float* hidden, const int32_t* unwanted = nullptr) {
    reserve(batch.num_tokens, team.size());
    plan_.prepare(batch, shape_.heads, shape_.kv_heads, shape_.head_dim);
    const KvLayer kv{nullptr, block_stride, block_size, shape_.kv_heads, shape_.head_dim, kv_type};
    team.run([&](int rank) { walk(team, rank, batch, token_ids, kv, kv_layers, hidden, unwanted); });
    return !is_given_up_;
  }

 private:
  void reserve(int tokens, int threads) {
    size_t t = tokens, widest = std::max({shape_.hidden, shape_.heads * shape_.head_dim, shape_.intermediate});
    if (packed_.size() < t * packed_width_) {
      packed_.resize(t * packed_width_);
      qkv_.resize(t * qkv_width_);
      attended_.resize(t * shape_.heads * shape_.head_dim);
      gate_up_.resize(t * 2 * shape_.intermediate);
    }
    scratch_.resize(threads);
    rows_.resize(threads);
    for (auto& row : rows_) row.resize(widest);
  }

  void walk(Team& team, int rank, const Batch& batch, const int64_t* token_ids, KvLayer kv, uint8_t* const* kv_layers,
            float* hidden, const int32_t* unwanted) {
    const int size = team.size(), tokens = batch.num_tokens;
    const Range mine = part_of(tokens, rank, size);
    embed(mine, token_ids, hidden);
    for (size_t index = 0; index < layers_.size(); index++) {
      const LayerPointers& layer = layers_[index];
      kv.base = kv_layers[index];
      normalise(mine, hidden, layer.attention_norm, *layer.qkv, rank);
      // One thread looks, and all go by what it saw: were each to look, some would wait at barriers for the others.
      if (rank == 0) is_given_up_ = unwanted != nullptr && __atomic_load_n(unwanted, __ATOMIC_RELAXED) != 0;
      team.barrier();
      if (is_given_up_) return;
      if (rank == 0) plan_.next.store(0, std::memory_order_relaxed);  // nobody takes items between these barriers
      multiply(*layer.qkv, packed_.data(), tokens, qkv_.data(), false, rank, size);
      team.barrier();
      place_heads(mine, layer, kv, batch);
      team.barrier();
      paged_attention(kv, batch, plan_, qkv_.data(), qkv_width_, shape_.heads, shape_.scale, attended_.data(),
                      scratch_[rank]);
      team.barrier();
      merge_attention(batch, plan_, mine, shape_.heads, shape_.head_dim, attended_.data());
      for (int t = mine.begin; t < mine.end; t++)
        pack(*layer.output, &attended_[static_cast<size_t>(t) * layer.output->inputs], t);
      team.barrier();
      multiply(*layer.output, packed_.data(), tokens, hidden, true, rank, size);
      team.barrier();
      normalise(mine, hidden, layer.feed_forward_norm, *layer.gate_up, rank);
      team.barrier();
      multiply(*layer.gate_up, packed_.data(), tokens, gate_up_.data(), false, rank, size);
      team.barrier();
      activate(mine, *layer.down, rank);
      team.barrier();
      multiply(*layer.down, packed_.data(), tokens, hidden, true, rank, size);
      team.barrier();
    }
  }

  void embed(Range mine, const int64_t* token_ids, float* hidden) {
    for (int t = mine.begin; t < mine.end; t++)
      for (int i = 0; i < shape_.hidden; i++) {
        size_t at = static_cast<size_t>(token_ids[t]) * shape_.hidden + i;
        hidden[static_cast<size_t>(t) * shape_.hidden + i] =
            static_cast<Type>(shape_.type) == Type::f32 ? static_cast<const float*>(embedding_)[at]
                                                        : widen(static_cast<const uint16_t*>(embedding_)[at]);
      }
  }

  void pack(const Linear& linear, const float* row, int t) {
    pack_row(linear, row, &packed_[static_cast<size_t>(t) * linear.row_words]);
  }

  void normalise(Range mine, const float* hidden, const float* weight, const Linear& next, int rank) {
    float* row = rows_[rank].data();
    for (int t = mine.begin; t < mine.end; t++) {
      rms_norm(hidden + static_cast<size_t>(t) * shape_.hidden, weight, shape_.hidden, shape_.eps, row);
      pack(next, row, t);
    }
  }

  void activate(Range mine, const Linear& next, int rank) {
    float* row = rows_[rank].data();
    for (int t = mine.begin; t < mine.end; t++) {
      silu_and_mul(&gate_up_[static_cast<size_t>(t) * 2 * shape_.intermediate], shape_.intermediate, row);
      pack(next, row, t);
    }
  }

  // Head norms and rotation in place, then keys and values to the cache.
  void place_heads(Range mine, const LayerPointers& layer, const KvLayer& kv, const Batch& batch) {
    const int dim = shape_.head_dim;
    for (int t = mine.begin; t < mine.end; t++) {
      float* heads = &qkv_[static_cast<size_t>(t) * qkv_width_];
      for (int h = 0; h < shape_.heads + shape_.kv_heads; h++) {
        const float* norm = h < shape_.heads ? layer.query_norm : layer.key_norm;
        if (norm) rms_norm(heads + h * dim, norm, dim, shape_.eps, heads + h * dim);
        rotate(heads + h * dim, cos_sin_ + batch.positions[t] * dim, dim);
      }
      if (batch.slots[t] < 0) continue;
      for (int h = 0; h < 2 * shape_.kv_heads; h++)
        write_head(kv, batch.slots[t], h >= shape_.kv_heads, h % shape_.kv_heads, heads + (shape_.heads + h) * dim);
    }
  }

  const DecoderShape shape_;
  const std::vector<LayerPointers> layers_;
  const void* embedding_;
  const float* cos_sin_;
  const int qkv_width_;
  int packed_width_ = 0;  // words of the widest packed row
  std::vector<uint32_t> packed_;
  std::vector<float> qkv_, attended_, gate_up_;
  AttentionPlan plan_;
  bool is_given_up_ = false;
  std::vector<AttentionScratch> scratch_;
  std::vector<std::vector<float>> rows_;
};

}  // namespace tandem
