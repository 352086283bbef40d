// A machine that runs the threads of a Metal kernel, a threadgroup after the other.
//
// A thread is a fibre, which runs until it has to wait for others (at a barrier, in a sum over its simdgroup). So a
// barrier that is missing shows: the others have not written or not read yet. A thread that others wait for in vain is
// an error, as is more than 32 KB of threadgroup memory, which starts as NaN.
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "metal_emulator.h"  // last, as its macros would change the others

namespace machine {
namespace {
constexpr int STACK = 1 << 16;
struct Group { int members, arrived; long met; float values[32]; };
struct Fibre { ucontext_t context; std::vector<char> stack; Place place; bool done; };
ucontext_t scheduler;
std::vector<Fibre> fibres(1024);
std::vector<Any> arguments;
std::map<void*, long> poisoned;  // in which threadgroup
Fibre* current;
Group everyone, simds[32];
bool moved;
long number, bytes_used;

void fail(const char* why) {
  fprintf(stderr, "%s\n", why);
  exit(3);
}

void meet(Group& group) {
  const long met = group.met;
  moved = true;
  if (++group.arrived == group.members) {
    group.arrived = 0;
    group.met++;
  }
  while (group.met == met) swapcontext(&current->context, &scheduler);
}

void enter() {
  kernel(arguments.data(), current->place);
  current->done = moved = true;
}

void run_threadgroup(uint3 at, uint3 size, uint3 begin, bool backwards) {
  const int count = size.x * size.y * size.z;
  number++;
  bytes_used = 0;
  everyone = Group{count};
  for (int s = 0; s < 32; s++) simds[s] = Group{std::min(32, std::max(0, count - 32 * s))};
  for (int i = 0; i < count; i++) {
    const uint3 in = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    Fibre& f = fibres[i];
    f.stack.resize(STACK);
    f.done = false;
    f.place = {{begin.x + in.x, begin.y + in.y, begin.z + in.z}, in, at, i % 32u, i / 32u};
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data();
    f.context.uc_stack.ss_size = STACK;
    f.context.uc_link = &scheduler;
    makecontext(&f.context, enter, 0);
  }
  const int groups = (count + 31) / 32;
  for (int left = count; left > 0;) {
    bool any = false;
    for (int j = 0; j < groups; j++) {
      const int first = 32 * (backwards ? groups - 1 - j : j), end = std::min(count, first + 32);
      do {  // a simdgroup goes as far ahead of the others as it can
        moved = false;
        for (int i = first; i < end; i++) {
          current = &fibres[backwards ? first + end - 1 - i : i];
          if (current->done) continue;
          swapcontext(&scheduler, &current->context);
          left -= current->done;
        }
        any |= moved;
      } while (moved);
    }
    if (!any) fail("threads wait for others that do not come");
  }
}
}  // namespace

void barrier() { meet(everyone); }

float of_simd(float x, float (*join)(float, float)) {
  Group& group = simds[current->place.simdgroup_index_in_threadgroup];
  group.values[current->place.thread_index_in_simdgroup] = x;
  meet(group);
  float all = group.values[0];
  for (int i = 1; i < group.members; i++) all = join(all, group.values[i]);
  meet(group);
  return all;
}

void poison(void* memory, size_t bytes) {
  if (poisoned[memory] == number) return;
  poisoned[memory] = number;
  memset(memory, 0xff, bytes);
  if ((bytes_used += bytes) > 32768) fail("more than 32 KB of threadgroup memory");
}
}  // namespace machine

// Arguments: a folder with one file per buffer, read and written back; the threads of the grid and of a threadgroup
// along x, y and z. The threads take turns in two orders, with equal results.
int main(int, char** given) {
  using namespace machine;
  std::vector<std::string> before, after;
  const auto name = [&](size_t i) { return std::string(given[1]) + "/" + std::to_string(i); };
  while (std::ifstream file{name(before.size()), std::ios::binary})
    before.push_back({std::istreambuf_iterator<char>(file), {}});
  for (const auto& all : before) arguments.push_back({malloc(all.size())});
  unsigned n[6];
  for (int i = 0; i < 6; i++) n[i] = atoi(given[2 + i]);
  const uint3 grid = {n[0], n[1], n[2]}, most = {std::min(n[3], n[0]), std::min(n[4], n[1]), std::min(n[5], n[2])};
  if (most.x * most.y * most.z > 1024) fail("more than 1024 threads in a threadgroup");
  for (const bool backwards : {false, true}) {
    for (size_t i = 0; i < before.size(); i++) memcpy(arguments[i].at, before[i].data(), before[i].size());
    for (unsigned z = 0; z * most.z < grid.z; z++)
      for (unsigned y = 0; y * most.y < grid.y; y++)
        for (unsigned x = 0; x * most.x < grid.x; x++) {
          const uint3 begin = {x * most.x, y * most.y, z * most.z};
          const uint3 left = {grid.x - begin.x, grid.y - begin.y, grid.z - begin.z};
          const uint3 size = {std::min(most.x, left.x), std::min(most.y, left.y), std::min(most.z, left.z)};
          run_threadgroup({x, y, z}, size, begin, backwards);
        }
    for (size_t i = 0; i < before.size(); i++) {
      const std::string all(static_cast<char*>(arguments[i].at), before[i].size());
      if (!backwards) after.push_back(all);
      if (after[i] != all) fail("the result depends on the order of the threads");
    }
  }
  for (size_t i = 0; i < after.size(); i++) std::ofstream(name(i), std::ios::binary) << after[i];
}
