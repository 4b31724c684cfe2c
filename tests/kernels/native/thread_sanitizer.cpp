// Runs everything that several threads do at once, under ThreadSanitizer: teams that are made and freed, calls from two
// threads, products, decoder steps that split attention over threads, generation, sampling. Prints nothing and exits 0 if
// all is well.
#include "small_model.hpp"

#include <cstdio>
#include <thread>

using namespace small_model;

int main() {
  for (KvType type : {KvType::f32, KvType::bf16, KvType::i8})
    if (run_steps(3, type) != run_steps(1, type)) return std::fprintf(stderr, "three threads compute other bits\n"), 1;
  Team *team = tandem_team(3), *alone = tandem_team(1);
  const int first_cpu = 0;
  tandem_team_place(team, &first_cpu, 1, 0);
  const std::vector<int64_t> expected = run_sampling(alone, 40, 1000);
  bool is_equal[2] = {};
  std::thread other([&] { is_equal[0] = run_sampling(team, 40, 1000) == expected; });  // calls queue up
  is_equal[1] = run_sampling(team, 40, 1000) == expected;
  other.join();
  tandem_team_free(team);
  tandem_team_free(alone);
  if (!is_equal[0] || !is_equal[1]) return std::fprintf(stderr, "three threads draw other tokens\n"), 1;
  return 0;
}
