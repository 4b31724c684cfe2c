// A whole decoder step: every thread walks the layers, a barrier between phases that depend on each other.
//
// The residual stream is float32 from the embedding to the head. Inputs of a matrix multiplication are rounded to the
// type of its weight, keys and values to the type of the cache.
#pragma once
#include <algorithm>

#include "attention.hpp"
#include "linear.hpp"

namespace tandem {

// Mirrored by `DecoderShape` in decoder_step.py.
struct DecoderShape {
  int32_t hidden, heads, kv_heads, head_dim, num_layers;
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
        cos_sin_(cos_sin) {
    for (const LayerPointers& layer : layers_) {
      for (const Linear* linear : {layer.qkv, layer.output, layer.gate_up})
        packed_width_ = std::max(packed_width_, static_cast<size_t>(linear->row_words));
      gated_width_ = std::max(gated_width_, static_cast<size_t>(layer.down->row_words));
    }
  }

  // Computes the step; `hidden` [T, hidden] receives the stream before the final norm.
  // `kv_layers` are the layers' bases in the arena, whose blocks are `block_stride` bytes apart.
  // Once another thread made `*unwanted` other than 0 it ends before the next layer: false, and nothing of it counts.
  bool step(Team& team, const Batch& batch, const int64_t* token_ids, KvType kv_type, uint8_t* const* kv_layers,
            int64_t block_stride, int block_size, float* hidden, const int32_t* unwanted = nullptr) {
    reserve(batch.num_tokens, team.size());
    plan_.prepare(batch, shape_.heads, shape_.kv_heads, shape_.head_dim, team.size());
    const KvLayer kv{nullptr, block_stride, block_size, shape_.kv_heads, shape_.head_dim, kv_type};
    team.run([&](int rank) { walk(team, rank, batch, token_ids, kv, kv_layers, hidden, unwanted); });
    return !is_given_up_;
  }

 private:
  void reserve(int tokens, int threads) {
    const size_t t = tokens, attended = t * shape_.heads * shape_.head_dim;
    if (attended_.size() < attended) {
      packed_.resize(packed_row_places(tokens) * packed_width_);
      gated_.resize(packed_row_places(tokens) * gated_width_);
      query_.resize(attended);
      attended_.resize(attended);
    }
    scratch_.resize(threads);
    rows_.resize(threads);
    for (auto& row : rows_) row.resize(shape_.hidden);
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
      if (rank == 0) plan_.rewind();  // nobody takes items between these barriers
      const HeadRows heads{shape_.heads, kv, layer.query_norm, layer.key_norm, shape_.eps, cos_sin_,
                           batch.positions, batch.slots, query_.data()};
      multiply(*layer.qkv, packed_.data(), tokens, heads, rank, size);
      team.barrier();
      paged_attention(kv, batch, plan_, query_.data(), shape_.heads, shape_.scale, attended_.data(), scratch_[rank]);
      team.barrier();
      merge_attention(batch, plan_, mine, shape_.heads, shape_.head_dim, attended_.data());
      for (int t = mine.begin; t < mine.end; t++)
        pack_row(*layer.output, &attended_[static_cast<size_t>(t) * layer.output->inputs], t, packed_.data());
      team.barrier();
      multiply(*layer.output, packed_.data(), tokens, StoreRows{shape_.hidden, hidden, true}, rank, size);
      team.barrier();
      normalise(mine, hidden, layer.feed_forward_norm, *layer.gate_up, rank);
      team.barrier();
      multiply(*layer.gate_up, packed_.data(), tokens, GateRows{*layer.down, gated_.data()}, rank, size);
      team.barrier();
      multiply(*layer.down, gated_.data(), tokens, StoreRows{shape_.hidden, hidden, true}, rank, size);
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

  void normalise(Range mine, const float* hidden, const float* weight, const Linear& next, int rank) {
    float* row = rows_[rank].data();
    for (int t = mine.begin; t < mine.end; t++) {
      rms_norm(hidden + static_cast<size_t>(t) * shape_.hidden, weight, shape_.hidden, shape_.eps, row);
      pack_row(next, row, t, packed_.data());
    }
  }

  const DecoderShape shape_;
  const std::vector<LayerPointers> layers_;
  const void* embedding_;
  const float* cos_sin_;
  size_t packed_width_ = 0, gated_width_ = 0;  // words of the widest packed rows
  Lines<uint32_t> packed_, gated_;             // input rows; of the feed-forward's second half
  Lines<float> query_, attended_;
  AttentionPlan plan_;
  bool is_given_up_ = false;
  std::vector<AttentionScratch> scratch_;
  std::vector<std::vector<float>> rows_;
};

}  // namespace tandem
