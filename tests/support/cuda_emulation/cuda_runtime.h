// CUDA on the CPU. Each thread of a block is a fiber that runs until it waits for others; which one runs next is drawn
// at random, so that what works only in one order fails. Asynchronous copies arrive when they are waited for, no sooner.
#pragma once
#include <dlfcn.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

constexpr size_t STACK = 64 * 1024;
constexpr unsigned WARP = 32;

struct Copy {
  char* target;
  const char* source;
  int size, valid;
};

struct Thread {
  dim3 index;
  unsigned number = 0;
  bool started = false, done = false;
  ucontext_t context;
  std::vector<char> stack;
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
};

// What a lane shows to the other lanes of its warp.
struct Shown {
  uint32_t words[16];
};

struct Warp {
  unsigned arrived = 0, round = 0;
  Shown shown[2][WARP];
};

inline std::vector<Thread> threads;
inline std::vector<Warp> warps;
inline Thread* current = nullptr;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline dim3 block_index, grid_size, block_size;
inline unsigned arrived = 0, round_ = 0, alive = 0;
inline uint64_t random_state = 0x9e3779b97f4a7c15;
inline char anchor;

inline unsigned draw(unsigned below) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return (random_state >> 33) % below;
}

inline void wait_for_others() { swapcontext(&current->context, &scheduler); }

inline void run_thread() {
  body();
  current->done = true;
  --alive;
  swapcontext(&current->context, &scheduler);
}

inline void block_barrier() {
  unsigned mine = round_;
  if (++arrived == alive) {
    arrived = 0;
    ++round_;
    return;
  }
  while (round_ == mine) wait_for_others();
}

// All lanes of a warp show something at the same place, and see what the others show.
inline const Shown* exchange(const Shown& mine) {
  Warp& warp = warps[current->number / WARP];
  unsigned lanes = std::min<unsigned>(WARP, threads.size() - current->number / WARP * WARP);
  unsigned round = warp.round;
  Shown* shown = warp.shown[round % 2];
  shown[current->number % WARP] = mine;
  if (++warp.arrived == lanes) {
    warp.arrived = 0;
    ++warp.round;
  } else {
    while (warp.round == round) wait_for_others();
  }
  return shown;
}

inline void run_block(unsigned count) {
  alive = count;
  arrived = 0;
  warps.assign((count + WARP - 1) / WARP, Warp());
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    thread.number = i;
    thread.index = dim3(i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y);
    thread.started = thread.done = false;
    thread.open.clear();
    thread.groups.clear();
  }
  std::vector<unsigned> waiting(count);
  for (unsigned i = 0; i < count; ++i) waiting[i] = i;
  for (uint64_t idle = 0; !waiting.empty(); ++idle) {
    if (idle > (uint64_t(1) << 24) * count) {
      fprintf(stderr, "a block of threads waits for ever\n");
      abort();
    }
    unsigned place = draw(waiting.size());
    current = &threads[waiting[place]];
    if (!current->started) {
      current->started = true;
      current->stack.resize(STACK);
      getcontext(&current->context);
      current->context.uc_stack.ss_sp = current->stack.data();
      current->context.uc_stack.ss_size = STACK;
      current->context.uc_link = nullptr;
      makecontext(&current->context, run_thread, 0);
    }
    swapcontext(&scheduler, &current->context);
    if (current->done) {
      waiting[place] = waiting.back();
      waiting.pop_back();
    }
  }
}

inline void run_grid(dim3 grid, dim3 block, std::function<void()> kernel) {
  grid_size = grid;
  block_size = block;
  body = std::move(kernel);
  unsigned count = block.x * block.y * block.z;
  if (threads.size() != count) threads = std::vector<Thread>(count);
  for (block_index.z = 0; block_index.z < grid.z; ++block_index.z)
    for (block_index.y = 0; block_index.y < grid.y; ++block_index.y)
      for (block_index.x = 0; block_index.x < grid.x; ++block_index.x) run_block(count);
}

inline char* address(uint32_t shared) { return &anchor + (int32_t)shared; }
inline int code(uint32_t word, unsigned i, bool is_signed) {
  uint8_t bits = word >> (8 * i);
  return is_signed ? (int)(int8_t)bits : (int)bits;
}

inline void copy_later(uint32_t target, const void* source, int size, int valid) {
  current->open.push_back({address(target), (const char*)source, size, valid});
}
inline void close_group() {
  current->groups.push_back(std::move(current->open));
  current->open.clear();
}
inline void wait_for_groups(size_t but) {
  while (current->groups.size() > but) {
    for (const Copy& copy : current->groups.front()) {
      memset(copy.target, 0, copy.size);
      memcpy(copy.target, copy.source, copy.valid);
    }
    current->groups.erase(current->groups.begin());
  }
}

// ldmatrix .x4: lanes 8 i to 8 i + 7 point at the eight rows of matrix i; a lane gets four bytes of each.
inline void load_matrices(uint32_t* words[4], uint32_t row) {
  Shown mine{};
  mine.words[0] = row;
  const Shown* shown = exchange(mine);
  unsigned lane = current->number % WARP;
  for (unsigned i = 0; i < 4; ++i) memcpy(words[i], address(shown[8 * i + lane / 4].words[0]) + lane % 4 * 4, 4);
}

// mma.m16n8k32: lane 4 g + q holds rows g and g + 8 and column g, depths 4 q and 16 + 4 q, and sums of columns 2 q.
inline void multiply(uint32_t* sums[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const uint32_t (&c)[4], bool left_signed) {
  Shown mine{};
  for (int i = 0; i < 4; ++i) mine.words[i] = a[i];
  for (int i = 0; i < 2; ++i) mine.words[4 + i] = b[i];
  const Shown* shown = exchange(mine);
  unsigned lane = current->number % WARP, g = lane / 4, q = lane % 4;
  for (unsigned i = 0; i < 4; ++i) {
    unsigned upper = i / 2, column = 2 * q + i % 2;
    uint32_t total = c[i];
    for (unsigned k = 0; k < 32; ++k) {
      uint32_t left = shown[4 * g + k % 16 / 4].words[upper + k / 16 * 2];
      uint32_t right = shown[4 * column + k % 16 / 4].words[4 + k / 16];
      total += (uint32_t)(code(left, k % 4, left_signed) * code(right, k % 4, true));
    }
    *sums[i] = total;
  }
}

}  // namespace emulation

#define threadIdx (emulation::current->index)
#define blockIdx (emulation::block_index)

typedef int cudaError_t;
typedef void* cudaStream_t;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorCudartUnloading = 4;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { *device = 0; return cudaSuccess; }

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args... args) {
  using namespace emulation;
  dim3 grid = config->gridDim, block = config->blockDim;
  // Kept for as long as the process runs: a graph may run it again.
  auto* closure = new std::function<void()>([=]() { run_grid(grid, block, [=]() { kernel(args...); }); });
  auto run = [](void* made) { (*(std::function<void()>*)made)(); };
  typedef int (*Launched)(void*, void (*)(void*), void*);
  static Launched launched = (Launched)dlsym(RTLD_DEFAULT, "emulation_launched");
  int answer = launched(config->stream, run, closure);
  if (answer == 0) run(closure);
  return answer == 2 ? cudaErrorInvalidValue : cudaSuccess;
}

template <class A, class B> inline auto max(A a, B b) { return a > b ? a : b; }
template <class A, class B> inline auto min(A a, B b) { return a < b ? a : b; }
inline int __clz(int value) { return value ? __builtin_clz((unsigned)value) : 32; }
inline int __clzll(long long value) { return value ? __builtin_clzll((unsigned long long)value) : 64; }
inline void __syncthreads() { emulation::block_barrier(); }
inline uint32_t __cvta_generic_to_shared(const void* pointer) { return (uint32_t)((const char*)pointer - &emulation::anchor); }
template <class T> inline T __shfl_xor_sync(unsigned, T value, int lanes, int = 32) {
  emulation::Shown mine{};
  memcpy(mine.words, &value, sizeof value);
  const emulation::Shown* shown = emulation::exchange(mine);
  T found;
  memcpy(&found, shown[(emulation::current->number % emulation::WARP) ^ lanes].words, sizeof found);
  return found;
}
// Only the number of the warp is passed around, which all lanes know.
inline unsigned __shfl_sync(unsigned, unsigned value, int, int = 32) { return value; }

// The instructions, by the names of TVM's wrappers.
inline void tvm_builtin_ptx_cp_async_cg_async_cg_shared_global_16(uint32_t target, const void* source) {
  emulation::copy_later(target, source, 16, 16);
}
inline void tvm_builtin_ptx_cp_async_cg_src_size_async_cg_shared_global_16(uint32_t target, const void* source, uint32_t valid) {
  emulation::copy_later(target, source, 16, valid);
}
inline void tvm_builtin_ptx_cp_async_commit_group_async_commit_group() { emulation::close_group(); }
inline void tvm_builtin_ptx_cp_async_wait_group_async_wait_group_1() { emulation::wait_for_groups(1); }
inline void tvm_builtin_ptx_ldmatrix_sync_aligned_m8n8_x4_shared_b16(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t row) {
  uint32_t* words[] = {&a, &b, &c, &d};
  emulation::load_matrices(words, row);
}
#define EMULATED_MULTIPLY(kind, left_signed)                                                                         \
  inline void tvm_builtin_ptx_mma_int_sync_aligned_m16n8k32_row_col_s32_##kind##_s8_s32(                             \
      uint32_t& d0, uint32_t& d1, uint32_t& d2, uint32_t& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,    \
      uint32_t b0, uint32_t b1, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {                                \
    uint32_t* sums[] = {&d0, &d1, &d2, &d3};                                                                         \
    emulation::multiply(sums, {a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}, left_signed);                            \
  }
EMULATED_MULTIPLY(s8, true)
EMULATED_MULTIPLY(u8, false)
