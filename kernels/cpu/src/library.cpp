// The C interface, mirrored by library.py. All tensors are dense rows unless a stride is given; types are `Type`.
#include "decoder.hpp"
#include "generate.hpp"
#include "sample.hpp"
#include "pack.hpp"

using namespace tandem;

// What `begin` makes for a thread is called with rows, each of which comes once; a row alone, by the caller.
static void over_rows(Team* team, int rows, const auto& begin) {
  std::atomic<int> next{0};
  auto share = [&](int) {
    auto work = begin();
    for (int row; (row = next.fetch_add(1, std::memory_order_relaxed)) < rows;) work(row);
  };
  if (rows == 1)
    share(0);
  else
    team->run(share);
}

extern "C" {

Team* tandem_team(int size) { return new Team(size); }
void tandem_team_place(Team* team, const int* cpus, int count, int spins) { team->place(cpus, count, spins); }
void tandem_team_free(Team* team) { delete team; }

// Bytes that a packed weight takes, multiples of 64.
int64_t tandem_packed_bytes(int format, int outputs, int inputs) {
  return static_cast<int64_t>(Geometry(static_cast<Format>(format), outputs, inputs).total_words()) * 4;
}
// weight [outputs, inputs] of `type` as `Source` says -> packed [tandem_packed_bytes]
void tandem_pack(Team* team, int format, int outputs, int inputs, const void* weight, int type, const float* bias,
                 void* packed) {
  pack_weight(*team, Geometry(static_cast<Format>(format), outputs, inputs), {weight, static_cast<Type>(type), bias},
              static_cast<uint32_t*>(packed));
}
// A view of a packed weight, which outlives it.
Linear* tandem_linear(int format, int outputs, int inputs, const void* packed) {
  return new Linear(static_cast<Format>(format), outputs, inputs, static_cast<const uint32_t*>(packed));
}
void tandem_linear_free(Linear* linear) { delete linear; }

// x float32 [rows, inputs] -> out float32 [rows, outputs]; a norm weight, if given, is applied to x first.
void tandem_multiply(Team* team, const Linear* linear, const float* x, const float* norm, float eps, int rows,
                     float* out) {
  auto packed = allocate<uint32_t>(packed_row_places(rows) * linear->row_words);
  team->run([&](int rank) {
    std::vector<float> normed(linear->inputs);
    Range mine = part_of(rows, rank, team->size());
    for (int t = mine.begin; t < mine.end; t++) {
      const float* row = x + static_cast<size_t>(t) * linear->inputs;
      if (norm) rms_norm(row, norm, linear->inputs, eps, normed.data());
      pack_row(*linear, norm ? normed.data() : row, t, packed.get());
    }
    team->barrier();
    multiply(*linear, packed.get(), rows, StoreRows{linear->outputs, out, false}, rank, team->size());
  });
}

void tandem_rms_norm(const float* x, const float* weight, int rows, int width, float eps, float* out) {
  for (int64_t t = 0; t < rows; t++) rms_norm(x + t * width, weight, width, eps, out + t * width);
}

void tandem_silu_and_mul(const float* x, int rows, int width, float* out) {
  for (int64_t t = 0; t < rows; t++) silu_and_mul(x + t * 2 * width, x + t * 2 * width + width, width, out + t * width);
}

// `block_stride` is in bytes; the base is of the layer's first block. `kv_type` is a `KvType`.
void tandem_paged_attention(Team* team, int kv_type, void* kv_base, int64_t block_stride, int block_size, int kv_heads,
                            int head_dim, const Batch* batch, const float* query, int heads, float scale, float* out) {
  const KvLayer kv{static_cast<uint8_t*>(kv_base), block_stride, block_size, kv_heads, head_dim,
                   static_cast<KvType>(kv_type)};
  AttentionPlan plan;
  plan.prepare(*batch, heads, kv_heads, head_dim, team->size());
  team->run([&](int rank) {
    AttentionScratch scratch;
    paged_attention(kv, *batch, plan, query, heads, scale, out, scratch);
    team->barrier();
    merge_attention(*batch, plan, part_of(batch->num_tokens, rank, team->size()), heads, head_dim, out);
  });
}

// key, value float32 [tokens, kv_heads, head_dim] to the slots; -1 is skipped.
void tandem_write_kv(int kv_type, void* kv_base, int64_t block_stride, int block_size, int kv_heads, int head_dim,
                     int tokens, const int64_t* slots, const float* key, const float* value) {
  const KvLayer kv{static_cast<uint8_t*>(kv_base), block_stride, block_size, kv_heads, head_dim,
                   static_cast<KvType>(kv_type)};
  for (int64_t row = 0; row < static_cast<int64_t>(tokens) * kv_heads; row++) {
    int64_t slot = slots[row / kv_heads];
    if (slot < 0) continue;
    write_head(kv, slot, 0, static_cast<int>(row % kv_heads), key + row * head_dim);
    write_head(kv, slot, 1, static_cast<int>(row % kv_heads), value + row * head_dim);
  }
}

Decoder* tandem_decoder(const DecoderShape* shape, const LayerPointers* layers, const void* embedding,
                        const float* cos_sin) {
  return new Decoder(*shape, layers, embedding, cos_sin);
}
void tandem_decoder_free(Decoder* decoder) { delete decoder; }

// As in `tandem_paged_attention`; `kv_layers` holds the base of every layer. 0: it ended early, see `Decoder::step`.
int tandem_decoder_step(Decoder* decoder, Team* team, const Batch* batch, const int64_t* token_ids, int kv_type,
                        void* const* kv_layers, int64_t block_stride, int block_size, float* hidden,
                        const int32_t* unwanted) {
  return decoder->step(*team, *batch, token_ids, static_cast<KvType>(kv_type),
                       reinterpret_cast<uint8_t* const*>(kv_layers), block_stride, block_size, hidden, unwanted);
}

// One token per row of logits [rows, vocab], which are overwritten.
void tandem_sample(Team* team, float* logits, int rows, int64_t vocab, const SampleRow* how, int64_t* tokens) {
  over_rows(team, rows, [=] {
    return [=, sampler = TokenSampler()](int row) mutable {
      tokens[row] = sampler.sample(how[row], logits + row * vocab, vocab);
    };
  });
}

// Of rows of logits [rows, vocab]: the log-probability of each one's token, and of its `wanted` likeliest ones, at most
// `width`. ids, tops [rows, width].
void tandem_logprobs(Team* team, const float* logits, int rows, int64_t vocab, const int64_t* tokens,
                     const int32_t* wanted, int width, float* chosen, int32_t* ids, float* tops) {
  over_rows(team, rows, [=] {
    return [=](int row) {
      const int64_t at = static_cast<int64_t>(row) * width;
      log_probabilities(logits + row * vocab, vocab, tokens[row], wanted[row], chosen + row, ids + at, tops + at);
    };
  });
}

Generator* tandem_generator(const GeneratorParts* parts) { return new Generator(*parts); }
void tandem_generator_free(Generator* generator) { delete generator; }
// As `Generator::step`.
void tandem_generate(Generator* generator, Team* team, int count) { generator->step(*team, count); }

}  // extern "C"
