// The threads of a block as contexts that take turns: one runs until it waits
// for others.
//
// Blocks, and the threads of a block between two barriers, run in an order that
// is shuffled anew in every launch: nothing may depend on it. Shared memory
// begins as garbage. A barrier that not all threads of the block, or not all
// lanes of the warp, come to is an error, though some devices would let it
// pass.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulated {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = size_t{1} << 18;

enum class State { kRuns, kAtBlock, kAtWarp, kDone };

struct Thread {
  ucontext_t beginning;
  std::unique_ptr<char[]> stack;
  bool begun = false;
  jmp_buf place;
  uint3 index;
  State state;
  int line;       // where it waits
  uint64_t word;  // what it brought
};

struct Block {
  const std::function<void()>* kernel;
  std::vector<std::unique_ptr<Thread>> threads;  // those of the largest block so far
  size_t count;
  std::vector<uint64_t> words;  // of the lanes of a warp that met, for each warp
  int votes;
  Thread* running;
  jmp_buf scheduler;
  std::string error;
};

Block block;
std::mt19937 orders;
std::vector<std::pair<std::unique_ptr<char[]>, size_t>> shared_variables;

void garbage(char* memory, size_t bytes) { std::memset(memory, 0xFF, bytes); }

std::vector<uint32_t> shuffled(size_t count) {
  std::vector<uint32_t> order(count);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), orders);
  return order;
}

// Goes on with a thread until it waits. A jump costs a tenth of swapcontext,
// which asks the kernel for the signals' mask: that only begins a stack.
void go_on(Thread& thread) {
  block.running = &thread;
  threadIdx = thread.index;
  if (_setjmp(block.scheduler) != 0) return;
  if (thread.begun) _longjmp(thread.place, 1);
  thread.begun = true;
  setcontext(&thread.beginning);
}

// Leaves the running thread until others have come as far.
void wait(State state, int line, uint64_t word) {
  Thread& self = *block.running;
  self.state = state;
  self.line = line;
  self.word = word;
  if (_setjmp(self.place) == 0) _longjmp(block.scheduler, 1);
}

void run_thread() {
  for (;;) {
    try {
      (*block.kernel)();
    } catch (const std::exception& error) {
      block.error = error.what();
    }
    wait(State::kDone, 0, 0);
  }
}

void add_thread() {
  auto thread = std::make_unique<Thread>();
  thread->stack = std::make_unique<char[]>(kStackBytes);
  getcontext(&thread->beginning);
  thread->beginning.uc_stack.ss_sp = thread->stack.get();
  thread->beginning.uc_stack.ss_size = kStackBytes;
  makecontext(&thread->beginning, run_thread, 0);
  block.threads.push_back(std::move(thread));
}

// Whether `count` threads from `first` on are in this state at one line.
bool met(size_t first, size_t count, State state) {
  const Thread& leader = *block.threads[first];
  for (size_t i = first; i < first + count; ++i) {
    const Thread& thread = *block.threads[i];
    if (thread.state != state || thread.line != leader.line) return false;
  }
  return true;
}

void release(size_t first, size_t count) {
  for (size_t i = first; i < first + count; ++i) block.threads[i]->state = State::kRuns;
}

// Lets those go on who have all met; false if nobody can.
bool let_go_on() {
  bool any = false;
  for (size_t first = 0; first < block.count; first += kWarp) {
    if (!met(first, kWarp, State::kAtWarp)) continue;
    for (int i = 0; i < kWarp; ++i) block.words[first + i] = block.threads[first + i]->word;
    release(first, kWarp);
    any = true;
  }
  if (met(0, block.count, State::kAtBlock)) {
    block.votes = 0;
    for (size_t i = 0; i < block.count; ++i) block.votes += block.threads[i]->word != 0;
    release(0, block.count);
    any = true;
  }
  return any;
}

std::string who_waits() {
  std::string text = "threads of a block do not meet:";
  const char* names[] = {" runs", " at a barrier of the block", " at one of the warp",
                         " has ended"};
  for (size_t i = 0; i < block.count; ++i) {
    const Thread& thread = *block.threads[i];
    const bool like_last = i > 0 && thread.state == block.threads[i - 1]->state &&
                           thread.line == block.threads[i - 1]->line;
    if (like_last) continue;
    text += " from " + std::to_string(i) + " on" + names[static_cast<int>(thread.state)];
    if (thread.state != State::kDone) text += " in line " + std::to_string(thread.line);
    text += ";";
  }
  return text;
}

void run_block() {
  for (auto& [memory, bytes] : shared_variables) garbage(memory.get(), bytes);
  for (size_t i = 0; i < block.count; ++i) {
    const auto n = static_cast<uint32_t>(i);
    block.threads[i]->index = {n % blockDim.x, n / blockDim.x % blockDim.y,
                               n / blockDim.x / blockDim.y};
  }
  release(0, block.count);
  const std::vector<uint32_t> order = shuffled(block.count);
  do {
    for (const uint32_t i : order) {
      Thread& thread = *block.threads[i];
      if (thread.state == State::kRuns) go_on(thread);
    }
  } while (block.error.empty() && let_go_on());
  if (block.error.empty() && !met(0, block.count, State::kDone)) block.error = who_waits();
}

}  // namespace

int meet_block(int line, uint64_t word) {
  wait(State::kAtBlock, line, word);
  return block.votes;
}

const uint64_t* meet_warp(int line, uint32_t mask, uint64_t word) {
  if (mask != 0xFFFFFFFFu) throw std::runtime_error("only whole warps are emulated");
  wait(State::kAtWarp, line, word);
  const uint32_t thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  return block.words.data() + thread / kWarp * kWarp;
}

void* shared_memory(size_t bytes, void*& place) {
  if (place == nullptr) {
    shared_variables.emplace_back(std::make_unique<char[]>(bytes), bytes);
    place = shared_variables.back().first.get();
    garbage(static_cast<char*>(place), bytes);
  }
  return place;
}

void launch(const Configuration& configuration, const std::function<void()>& kernel) {
  gridDim = configuration.grid;
  blockDim = configuration.block;
  const size_t threads = size_t{blockDim.x} * blockDim.y * blockDim.z;
  if (threads == 0 || threads > 1024 || threads % kWarp != 0 || gridDim.x == 0 || gridDim.y != 1 ||
      gridDim.z != 1 || configuration.dynamic_shared_bytes != 0) {
    throw std::runtime_error("a launch that is not emulated");
  }
  while (block.threads.size() < threads) add_thread();
  block.kernel = &kernel;
  block.count = threads;
  block.words.resize(threads);
  for (const uint32_t i : shuffled(gridDim.x)) {
    blockIdx = {i, 0, 0};
    run_block();
    if (block.error.empty()) continue;
    block.threads.clear();  // some are in the middle of the kernel
    throw std::runtime_error(std::exchange(block.error, {}));
  }
}

}  // namespace emulated

// The runtime, where a launch is over when it returns and an error is an
// exception.
cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaMemsetAsync(void* data, int value, size_t count, cudaStream_t) {
  std::memset(data, value, count);
  return cudaSuccess;
}

// From here on orders are those that follow from this number.
extern "C" __attribute__((visibility("default"))) void set_order(uint32_t seed) {
  emulated::orders.seed(seed);
}
