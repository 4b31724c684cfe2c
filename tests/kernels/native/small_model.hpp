// A decoder of two small layers and what is run on it, for the drivers here.
#pragma once
#include "library.cpp"

#include <vector>

namespace small_model {

constexpr int kHidden = 48, kHeads = 6, kKvHeads = 2, kDim = 16, kIntermediate = 72, kLayers = 2, kBlock = 16;
constexpr int kVocab = 50, kBlocks = 200, kLongest = 1300;

std::vector<float> ramp(size_t count, float scale) {
  std::vector<float> values(count);
  for (size_t i = 0; i < count; i++) values[i] = scale * static_cast<float>(static_cast<int>(i * 37 % 101) - 50) / 50;
  return values;
}

// A weight, packed by a team and kept with its handle.
struct Weight {
  std::unique_ptr<uint8_t[], Free> packed;
  Linear* linear;

  Weight(Team* team, int outputs, int inputs) : packed(allocate<uint8_t>(tandem_packed_bytes(0, outputs, inputs))) {
    std::vector<float> values = ramp(static_cast<size_t>(outputs) * inputs, 0.1f), bias = ramp(outputs, 0.1f);
    tandem_pack(team, 0, outputs, inputs, values.data(), 0, bias.data(), packed.get());
    linear = tandem_linear(0, outputs, inputs, packed.get());
  }
  ~Weight() { tandem_linear_free(linear); }
};

// Steps of a prompt of `longest` tokens in chunks, over a cache of one type, then tokens of three rows that share it;
// returns the last hidden states, the tokens and their log-probabilities.
std::vector<float> run_steps(int threads, KvType type, int longest = kLongest) {
  Team* team = tandem_team(threads);
  std::vector<std::unique_ptr<Weight>> weights;
  std::vector<LayerPointers> layers;
  const std::vector<float> norm(kHidden, 1.0f);
  auto weight = [&](int outputs, int inputs) {
    return weights.emplace_back(std::make_unique<Weight>(team, outputs, inputs))->linear;
  };
  for (int i = 0; i < kLayers; i++)
    layers.push_back({norm.data(), weight((kHeads + 2 * kKvHeads) * kDim, kHidden), nullptr, nullptr,
                      weight(kHidden, kHeads * kDim), norm.data(), weight(2 * kIntermediate, kHidden),
                      weight(kHidden, kIntermediate)});
  const std::vector<float> embedding = ramp(kVocab * kHidden, 1.0f), cos_sin(kLongest * kDim, 0.7f);
  const DecoderShape shape{kHidden, kHeads, kKvHeads, kDim, kLayers, 1e-5f, 0.25f, 0};
  Decoder* decoder = tandem_decoder(&shape, layers.data(), embedding.data(), cos_sin.data());
  const KvLayer kv{nullptr, 0, kBlock, kKvHeads, kDim, type};
  const int64_t layer_bytes = 2 * kBlock * kKvHeads * kv.row_bytes();
  std::vector<uint8_t> cache(kBlocks * kLayers * layer_bytes);
  void* bases[kLayers] = {cache.data(), cache.data() + layer_bytes};
  std::vector<int32_t> table(2 * kBlocks / 2);
  for (size_t i = 0; i < table.size(); i++) table[i] = static_cast<int32_t>(i);
  std::vector<float> hidden;
  for (int begin = 0, length; begin < longest; begin = length) {
    length = begin < 600 ? begin + 300 : begin < 610 ? begin + 5 : std::min(begin + 690, longest);
    const int tokens = length - begin;
    std::vector<int64_t> ids(tokens), positions(tokens), slots(tokens);
    for (int t = 0; t < tokens; t++) ids[t] = t % kVocab, positions[t] = slots[t] = begin + t;
    const int32_t starts[] = {0, tokens}, lengths[] = {length};
    const Batch batch{tokens, 1, static_cast<int>(table.size()), positions.data(), slots.data(), table.data(), starts, lengths};
    hidden.assign(static_cast<size_t>(tokens) * kHidden, 0.0f);
    tandem_decoder_step(decoder, team, &batch, ids.data(), static_cast<int>(type), bases, kLayers * layer_bytes, kBlock,
                        hidden.data(), nullptr);
  }
  constexpr int kRows = 3;
  int64_t tokens[kRows] = {1, 2, 3}, positions[kRows] = {4, longest / 2 + 50, longest - 100};
  std::vector<int32_t> tables;
  for (int row = 0; row < kRows; row++) {
    tables.insert(tables.end(), table.begin(), table.end());
    tables[(row * table.size()) + positions[row] / kBlock] = kBlocks - 1 - row;  // where the row writes is its own
  }
  SampleRow how[kRows] = {{7, 0, 0, 1.0, 0.8f, 0.0f, 0}, {7, 1, 0, 1.0, 0.0f, 0.0f, 0}, {7, 2, 0, 0.9, 0.8f, 0.0f, 9}};
  constexpr int kTop = 4;
  const int32_t num_logprobs[kRows] = {4, -1, 0};
  float logprobs[kRows] = {}, top_logprobs[kRows * kTop] = {};
  int32_t top_ids[kRows * kTop] = {};
  const GeneratorParts parts{decoder, weight(kVocab, kHidden), norm.data(), 1e-5f, kHidden, static_cast<int32_t>(type),
                             reinterpret_cast<uint8_t* const*>(bases), kLayers * layer_bytes, kBlock,
                             static_cast<int32_t>(table.size()), kRows, tokens, positions, tables.data(), how,
                             num_logprobs, kTop, logprobs, top_ids, top_logprobs};
  Generator* generator = tandem_generator(&parts);
  for (int step = 0; step < 3; step++) {
    tandem_generate(generator, team, kRows - step % 2);
    for (int64_t token : tokens) hidden.push_back(static_cast<float>(token));
    hidden.insert(hidden.end(), logprobs, logprobs + kRows);
    hidden.insert(hidden.end(), top_logprobs, top_logprobs + kRows * kTop);
  }
  tandem_generator_free(generator);
  tandem_decoder_free(decoder);
  weights.clear();
  tandem_team_free(team);
  return hidden;
}

std::vector<int64_t> run_sampling(Team* team, int rows, int vocab) {
  std::vector<float> logits = ramp(static_cast<size_t>(rows) * vocab, 4.0f);
  std::vector<SampleRow> how;
  for (uint64_t row = 0; row < static_cast<uint64_t>(rows); row++)
    how.push_back({row, 0, row, row % 3 ? 1.0 : 0.9, row % 4 ? 0.8f : 0.0f, 0.0f, row % 5 ? 0 : 7});
  std::vector<int64_t> tokens(rows);
  tandem_sample(team, logits.data(), rows, vocab, how.data(), tokens.data());
  return tokens;
}

}  // namespace small_model
