// The next token of every sequence of a batch in one call: layers, head, choice, log-probabilities.
//
// Caller and generator share a row per sequence. A step computes the KV of `token_ids[row]` at `positions[row]`, and
// leaves there what follows: the token that it chose, and the next position. So a caller whose sequences just go on
// writes nothing but the blocks that they take.
#pragma once
#include "decoder.hpp"
#include "sample.hpp"

extern "C" {
void tandem_multiply(tandem::Team*, const tandem::Linear*, const float*, const float*, float, int, float*);
void tandem_sample(tandem::Team*, float*, int, int64_t, const tandem::SampleRow*, int64_t*);
void tandem_logprobs(tandem::Team*, const float*, int, int64_t, const int64_t*, const int32_t*, int, float*, int32_t*,
                     float*);
}

namespace tandem {

// Mirrored by `GeneratorParts` in token_generator.py. Everything pointed to outlives the generator.
struct GeneratorParts {
  Decoder* decoder;
  const Linear* head;
  const float* final_norm;
  float eps;
  int32_t hidden;
  int32_t kv_type;  // and the cache as in `tandem_decoder_step`
  uint8_t* const* kv_layers;
  int64_t block_stride;
  int32_t block_size, table_width, max_rows;
  int64_t *token_ids, *positions;  // [max_rows]
  const int32_t* tables;           // [max_rows, table_width]
  SampleRow* how;                  // [max_rows], `position` is the generator's to set
  const int32_t* num_logprobs;     // [max_rows], of the likeliest tokens; -1: none, not even the chosen one's
  int32_t max_logprobs;
  float* logprobs;      // [max_rows], of rows that want them, one after the other; of the token before any edit
  int32_t* top_ids;     // [max_rows, max_logprobs]
  float* top_logprobs;  // likewise
};

class Generator {
 public:
  explicit Generator(const GeneratorParts& parts)
      : parts_(parts), slots_(parts.max_rows), seq_lens_(parts.max_rows), query_start_(parts.max_rows + 1) {
    for (int row = 0; row <= parts.max_rows; row++) query_start_[row] = row;
  }

  // Rows [0, count).
  void step(Team& team, int count) {
    const GeneratorParts& p = parts_;
    for (int row = 0; row < count; row++) {
      const int64_t at = p.positions[row], block = p.tables[static_cast<int64_t>(row) * p.table_width + at / p.block_size];
      slots_[row] = block * p.block_size + at % p.block_size;
      seq_lens_[row] = static_cast<int32_t>(at + 1);
      p.how[row].position = at + 1;
    }
    if (count > reserved_) reserve(count);
    const Batch batch{count,        count,    p.table_width,       p.positions,
                      slots_.data(), p.tables, query_start_.data(), seq_lens_.data()};
    p.decoder->step(team, batch, p.token_ids, static_cast<KvType>(p.kv_type), p.kv_layers, p.block_stride, p.block_size,
                    hidden_.get());
    tandem_multiply(&team, p.head, hidden_.get(), p.final_norm, p.eps, count, logits_.get());
    const int wanting = keep_logits(count);
    tandem_sample(&team, logits_.get(), count, p.head->outputs, p.how, p.token_ids);
    if (wanting) add_logprobs(team, wanting);
    for (int row = 0; row < count; row++) p.positions[row]++;
  }

 private:
  // Choosing overwrites logits: those of rows that want log-probabilities are put aside. Returns how many do.
  int keep_logits(int count) {
    const size_t vocab = parts_.head->outputs;
    wanting_.clear();
    for (int row = 0; row < count; row++)
      if (parts_.num_logprobs[row] >= 0) wanting_.push_back(row);
    if (raw_.size() < wanting_.size() * vocab) raw_.resize(wanting_.size() * vocab);
    for (size_t i = 0; i < wanting_.size(); i++)
      std::copy_n(logits_.get() + wanting_[i] * vocab, vocab, raw_.data() + i * vocab);
    return static_cast<int>(wanting_.size());
  }

  void add_logprobs(Team& team, int wanting) {
    const GeneratorParts& p = parts_;
    std::vector<int64_t> tokens(wanting);
    std::vector<int32_t> counts(wanting);
    for (int i = 0; i < wanting; i++) tokens[i] = p.token_ids[wanting_[i]], counts[i] = p.num_logprobs[wanting_[i]];
    tandem_logprobs(&team, raw_.data(), wanting, p.head->outputs, tokens.data(), counts.data(), p.max_logprobs, p.logprobs,
                    p.top_ids, p.top_logprobs);
  }

  void reserve(int count) {
    reserved_ = count;
    hidden_ = allocate<float>(static_cast<size_t>(count) * parts_.hidden);
    logits_ = allocate<float>(static_cast<size_t>(count) * parts_.head->outputs);
  }

  const GeneratorParts parts_;
  std::vector<int64_t> slots_;
  std::vector<int32_t> seq_lens_, query_start_;
  int reserved_ = 0;
  std::unique_ptr<float[], Free> hidden_, logits_;
  std::vector<int> wanting_;
  std::vector<float> raw_;
};

}  // namespace tandem
