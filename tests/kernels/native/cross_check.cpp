// Runs every native operation over odd shapes and writes the results, sections of floats in a fixed order, to standard
// output; the same program compiled for another processor must write nearly the same. Fails by itself where a row's bits depend on
// what shares its batch or on the number of threads.
#include "small_model.hpp"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

constexpr int kRows = 23;
constexpr float kClose = 2e-5f;

std::vector<float> noise(size_t count, uint64_t seed, float scale = 1.0f) {
  std::vector<float> values(count);
  for (size_t i = 0; i < count; i++) {
    const uint64_t bits = scramble(scramble(seed) + i);
    values[i] = scale * (static_cast<float>(bits >> 40) * 0x1p-23f - 1.0f);
  }
  return values;
}

// A section: how many values, how far each may be from another processor's, absolutely or relatively, the values.
void write(const std::vector<float>& values, float tolerance) {
  const float head[] = {static_cast<float>(values.size()), tolerance};
  if (std::fwrite(head, sizeof(float), 2, stdout) != 2) std::exit(2);
  if (std::fwrite(values.data(), sizeof(float), values.size(), stdout) != values.size()) std::exit(2);
}

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

void linear(Team* team, Team* alone, Format format, int outputs, int inputs) {
  const auto weight = noise(static_cast<size_t>(outputs) * inputs, outputs, 0.3f), bias = noise(outputs, inputs);
  std::vector<uint16_t> halves(weight.size());
  for (size_t i = 0; i < weight.size(); i++) halves[i] = to_bf16(weight[i]);
  const bool is_half = format == Format::bf16;
  const int code = static_cast<int>(format);
  auto packed = allocate<uint8_t>(tandem_packed_bytes(code, outputs, inputs));
  tandem_pack(team, code, outputs, inputs, is_half ? static_cast<const void*>(halves.data()) : weight.data(), is_half,
              bias.data(), packed.get());
  Linear* packed_linear = tandem_linear(code, outputs, inputs, packed.get());
  const auto x = noise(static_cast<size_t>(kRows) * inputs, 3);
  std::vector<float> whole(static_cast<size_t>(kRows) * outputs), part(whole.size());
  tandem_multiply(team, packed_linear, x.data(), nullptr, 0.0f, kRows, whole.data());
  write(whole, kClose);
  for (auto [begin, end] : {std::pair{0, 1}, {2, 5}, {1, 9}, {5, kRows}}) {
    tandem_multiply(alone, packed_linear, x.data() + begin * inputs, nullptr, 0.0f, end - begin, part.data());
    const size_t bytes = sizeof(float) * (end - begin) * outputs;
    require(!std::memcmp(part.data(), whole.data() + begin * outputs, bytes), "a product depends on its batch");
  }
  tandem_linear_free(packed_linear);
}

void elementwise(int width) {
  const auto x = noise(static_cast<size_t>(kRows) * 2 * width, width, 4.0f), weight = noise(width, 5);
  std::vector<float> out(static_cast<size_t>(kRows) * width);
  tandem_rms_norm(x.data(), weight.data(), kRows, width, 1e-6f, out.data());
  write(out, kClose);
  tandem_silu_and_mul(x.data(), kRows, width, out.data());
  write(out, kClose);
}

void attention(Team* team, KvType type, int dim) {
  constexpr int kLengths[] = {1, 37, 203}, kQueries[] = {1, 5, 1}, kTokens = 7;
  const KvLayer kv{nullptr, 0, small_model::kBlock, small_model::kKvHeads, dim, type};
  const int width = 13, tokens = 3 * width * kv.block_size;
  const int64_t stride = 2 * kv.block_size * kv.kv_heads * kv.row_bytes();
  std::vector<uint8_t> cache(3 * width * stride);
  std::vector<int64_t> slots(tokens), positions;
  std::vector<int32_t> tables(3 * width), starts{0}, lengths(kLengths, kLengths + 3);
  for (int i = 0; i < tokens; i++) slots[i] = (i * 7) % tokens;
  for (int i = 0; i < 3 * width; i++) tables[i] = (i * 5) % (3 * width);
  for (int s = 0; s < 3; s++) {
    for (int q = kQueries[s]; q > 0; q--) positions.push_back(kLengths[s] - q);
    starts.push_back(starts.back() + kQueries[s]);
  }
  const size_t values = static_cast<size_t>(tokens) * kv.kv_heads * dim;
  const auto key = noise(values, 6), value = noise(values, 7);
  const int code = static_cast<int>(type);
  tandem_write_kv(code, cache.data(), stride, kv.block_size, kv.kv_heads, dim, tokens, slots.data(), key.data(),
                  value.data());
  const auto query = noise(static_cast<size_t>(kTokens) * small_model::kHeads * dim, 8, 3.0f);
  std::vector<float> out(query.size());
  const Batch batch{kTokens, 3, width, positions.data(), slots.data(), tables.data(), starts.data(), lengths.data()};
  tandem_paged_attention(team, code, cache.data(), stride, kv.block_size, kv.kv_heads, dim, &batch, query.data(),
                         small_model::kHeads, 0.3f, out.data());
  write(out, kClose);
}

void logprobs(Team* team, int vocab) {
  const auto logits = noise(static_cast<size_t>(kRows) * vocab, vocab, 6.0f);
  const std::vector<int64_t> tokens(kRows, vocab / 2);
  const int width = std::min(vocab, 5);
  const std::vector<int32_t> wanted(kRows, width);
  std::vector<float> chosen(kRows), tops(kRows * width);
  std::vector<int32_t> ids(kRows * width);
  tandem_logprobs(team, logits.data(), kRows, vocab, tokens.data(), wanted.data(), width, chosen.data(), ids.data(),
                  tops.data());
  write(chosen, kClose);
  write(tops, kClose);
  write({ids.begin(), ids.end()}, 0.0f);
}

void model(KvType type) {
  const auto results = small_model::run_steps(2, type, 640);
  require(results == small_model::run_steps(1, type, 640), "two threads compute other bits than one");
  write(results, type == KvType::f32 ? 1e-4f : 2e-2f);  // else keys and values may be rounded to a neighbour
}

}  // namespace

int main() {
  Team *team = tandem_team(2), *alone = tandem_team(1);
  for (Format format : {Format::f32, Format::bf16, Format::int8, Format::int4})
    for (auto [outputs, inputs] : {std::pair{1, 1}, {31, 7}, {33, 64}, {97, 129}, {70, 711}})
      linear(team, alone, format, outputs, inputs);
  for (int width : {1, 17, 64, 100}) elementwise(width);
  for (KvType type : {KvType::f32, KvType::bf16, KvType::i8}) {
    for (int dim : {16, 48}) attention(team, type, dim);
    model(type);
  }
  for (int vocab : {1, 61, 1003}) {
    logprobs(team, vocab);
    const auto tokens = small_model::run_sampling(team, 40, vocab);
    write({tokens.begin(), tokens.end()}, 0.0f);
  }
  tandem_team_free(team);
  tandem_team_free(alone);
}
