// CUDA on the CPU. Each thread of a block is a fiber that runs until it waits for others; which one runs next is drawn
// at random, so that what works only in one order fails. Asynchronous copies arrive when they are waited for, no sooner.
#pragma once
#include <dlfcn.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <tuple>
#include <utility>
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
  std::vector<std::function<void()>> products;
  std::vector<std::vector<std::function<void()>>> product_groups;
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
// Addresses of shared memory count from here, so that they are multiples of what the memory itself is a multiple of.
inline char* shared_base() { return (char*)((uintptr_t)&anchor & ~(uintptr_t)0xfffff); }
inline uint32_t last_address = 0;

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
    thread.products.clear();
    thread.product_groups.clear();
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

inline char* address(uint32_t shared) { return shared_base() + (int32_t)shared; }
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

// ldmatrix: lanes 8 i to 8 i + 7 point at the eight rows of matrix i. A lane gets four bytes of a row of each matrix;
// transposed, two bytes of each of two rows.
inline void load_matrices(std::initializer_list<uint32_t*> words, uint32_t row, bool transposed) {
  Shown mine{};
  mine.words[0] = row;
  const Shown* shown = exchange(mine);
  unsigned lane = current->number % WARP, i = 0;
  for (uint32_t* word : words) {
    if (transposed) {
      for (unsigned part = 0; part < 2; ++part)
        memcpy((char*)word + 2 * part, address(shown[8 * i + lane % 4 * 2 + part].words[0]) + lane / 4 * 2, 2);
    } else {
      memcpy(word, address(shown[8 * i + lane / 4].words[0]) + lane % 4 * 4, 4);
    }
    ++i;
  }
}

// Sums of codes: lane 4 g + q holds row g of the left operand and column g of the right one, depths 4 q and on, and
// sums of columns 2 q. With 16 rows, words 0 and 2 are row g, 1 and 3 row g + 8; with 32 depths, words come in pairs.
inline void multiply(std::initializer_list<uint32_t*> sums, std::initializer_list<uint32_t> a, std::initializer_list<uint32_t> b,
                     std::initializer_list<uint32_t> c, bool left_signed, bool right_signed) {
  Shown mine{};
  unsigned i = 0, halves = a.size() / b.size(), depth = 16 * b.size();
  for (uint32_t word : a) mine.words[i++] = word;
  for (uint32_t word : b) mine.words[i++] = word;
  const Shown* shown = exchange(mine);
  unsigned lane = current->number % WARP, g = lane / 4, q = lane % 4;
  for (i = 0; i < sums.size(); ++i) {
    unsigned half = i / 2, column = 2 * q + i % 2;
    uint32_t total = c.begin()[i];
    for (unsigned k = 0; k < depth; ++k) {
      uint32_t left = shown[4 * g + k % 16 / 4].words[half + k / 16 * halves];
      uint32_t right = shown[4 * column + k % 16 / 4].words[a.size() + k / 16];
      total += (uint32_t)(code(left, k % 4, left_signed) * code(right, k % 4, right_signed));
    }
    *sums.begin()[i] = total;
  }
}

// Where a descriptor's matrix begins: it holds 18 bits of the address, and the rest is that of shared memory.
inline uint32_t described(uint64_t descriptor) {
  uint32_t low = (descriptor & 0x3fff) << 4, best = 0;
  for (int64_t high = (int64_t)(last_address & ~0x3ffffu) - 0x40000, i = 0; i < 3; ++i, high += 0x40000) {
    uint32_t found = (uint32_t)high | low;
    if (i == 0 || std::abs((int32_t)(found - last_address)) < std::abs((int32_t)(best - last_address))) best = found;
  }
  return best;
}

// A byte of a matrix of rows of 64 bytes, eight of them 512 bytes apart, swizzled: the hardware exchanges bits of the
// whole address, wherever in a row a product begins.
inline int described_code(uint32_t start, uint64_t descriptor, unsigned row, unsigned k, bool is_signed) {
  if (descriptor >> 62 != 2 || (descriptor >> 32 & 0x3fff) != 32) abort();
  uint32_t place = start + row / 8 * 512 + row % 8 * 64 + k;
  place ^= (place >> 7 & 3) << 4;
  uint8_t bits = *(uint8_t*)address(place);
  return is_signed ? (int)(int8_t)bits : (int)bits;
}

// wgmma.m64nNk32: a warp of the group has 16 rows, a lane the sums that it has with mma.m16n8k32, tile after tile. The
// product happens when it is waited for: until then nobody may touch what it reads and writes.
template <size_t count> inline void multiply_later(std::array<uint32_t*, count> sums, uint64_t left, uint64_t right, bool left_signed) {
  unsigned lane = current->number % WARP, warp = current->number / WARP % 4;
  uint32_t starts[] = {described(left), described(right)};
  current->products.push_back([=]() {
    for (unsigned i = 0; i < count; ++i) {
      unsigned row = 16 * warp + lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      uint32_t total = *sums[i];
      for (unsigned k = 0; k < 32; ++k)
        total += (uint32_t)(described_code(starts[0], left, row, k, left_signed) * described_code(starts[1], right, column, k, true));
      *sums[i] = total;
    }
  });
}
inline void close_products() {
  current->product_groups.push_back(std::move(current->products));
  current->products.clear();
}
inline void wait_for_products(size_t but) {
  while (current->product_groups.size() > but) {
    for (const auto& product : current->product_groups.front()) product();
    current->product_groups.erase(current->product_groups.begin());
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
inline uint32_t __cvta_generic_to_shared(const void* pointer) {
  return emulation::last_address = (uint32_t)((const char*)pointer - emulation::shared_base());
}
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
#define EMULATED_COPY(kind, size)                                                                                    \
  inline void tvm_builtin_ptx_cp_async_##kind##_async_##kind##_shared_global_##size(uint32_t target,                 \
                                                                                    const void* source) {            \
    emulation::copy_later(target, source, size, size);                                                               \
  }                                                                                                                  \
  inline void tvm_builtin_ptx_cp_async_##kind##_src_size_async_##kind##_shared_global_##size(                        \
      uint32_t target, const void* source, uint32_t valid) {                                                         \
    emulation::copy_later(target, source, size, valid);                                                              \
  }
EMULATED_COPY(cg, 16)
EMULATED_COPY(ca, 8)
EMULATED_COPY(ca, 4)
inline void tvm_builtin_ptx_cp_async_commit_group_async_commit_group() { emulation::close_group(); }
#define EMULATED_WAIT(but) \
  inline void tvm_builtin_ptx_cp_async_wait_group_async_wait_group_##but() { emulation::wait_for_groups(but); }
EMULATED_WAIT(0)
EMULATED_WAIT(1)
EMULATED_WAIT(2)
inline void tvm_builtin_ptx_ldmatrix_sync_aligned_m8n8_x2_shared_b16(uint32_t& a, uint32_t& b, uint32_t row) {
  emulation::load_matrices({&a, &b}, row, false);
}
inline void tvm_builtin_ptx_ldmatrix_sync_aligned_m8n8_x4_shared_b16(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t row) {
  emulation::load_matrices({&a, &b, &c, &d}, row, false);
}
inline void tvm_builtin_ptx_ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t row) {
  emulation::load_matrices({&a, &b, &c, &d}, row, true);
}
inline void tvm_builtin_ptx_prmt_b32(uint32_t& d, uint32_t a, uint32_t b, uint32_t selector) {
  uint64_t bytes = (uint64_t)b << 32 | a;
  d = 0;
  for (int i = 0; i < 4; ++i) d |= (uint32_t)(bytes >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
}
// Words are read and written where they are wanted, at multiples of all that is moved at once.
template <size_t count> inline const uint32_t* aligned_words(const void* place) {
  if ((uintptr_t)place % (4 * count)) abort();
  return (const uint32_t*)place;
}
inline void tvm_builtin_ptx_ld_global_b32(uint32_t& a, const void* from) { a = *aligned_words<1>(from); }
inline void tvm_builtin_ptx_ld_shared_b32(uint32_t& a, uint32_t from) { a = *aligned_words<1>(emulation::address(from)); }
inline void tvm_builtin_ptx_ld_vec_global_v2_b32(uint32_t& a, uint32_t& b, const void* from) {
  const uint32_t* words = aligned_words<2>(from);
  a = words[0], b = words[1];
}
inline void tvm_builtin_ptx_ld_vec_shared_v2_b32(uint32_t& a, uint32_t& b, uint32_t from) {
  tvm_builtin_ptx_ld_vec_global_v2_b32(a, b, emulation::address(from));
}
inline void tvm_builtin_ptx_ld_vec_global_v4_b32(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, const void* from) {
  const uint32_t* words = aligned_words<4>(from);
  a = words[0], b = words[1], c = words[2], d = words[3];
}
inline void tvm_builtin_ptx_ld_vec_shared_v4_b32(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t from) {
  tvm_builtin_ptx_ld_vec_global_v4_b32(a, b, c, d, emulation::address(from));
}
inline void tvm_builtin_ptx_st_global_b32(const void* to, uint32_t a) { *(uint32_t*)aligned_words<1>(to) = a; }
inline void tvm_builtin_ptx_st_shared_b32(uint32_t to, uint32_t a) { tvm_builtin_ptx_st_global_b32(emulation::address(to), a); }
inline void tvm_builtin_ptx_st_vec_global_v2_b32(const void* to, uint32_t a, uint32_t b) {
  uint32_t* words = (uint32_t*)aligned_words<2>(to);
  words[0] = a, words[1] = b;
}
inline void tvm_builtin_ptx_st_vec_shared_v2_b32(uint32_t to, uint32_t a, uint32_t b) {
  tvm_builtin_ptx_st_vec_global_v2_b32(emulation::address(to), a, b);
}
inline void tvm_builtin_ptx_st_vec_global_v4_b32(const void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  uint32_t* words = (uint32_t*)aligned_words<4>(to);
  words[0] = a, words[1] = b, words[2] = c, words[3] = d;
}
inline void tvm_builtin_ptx_st_vec_shared_v4_b32(uint32_t to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  tvm_builtin_ptx_st_vec_global_v4_b32(emulation::address(to), a, b, c, d);
}
inline void tvm_builtin_ptx_pin_register(uint32_t&) {}
inline void tvm_builtin_ptx_fence_proxy_proxy_async_shared__cta() {}
inline void tvm_builtin_ptx_wgmma_fence_fence_sync_aligned() {}
inline void tvm_builtin_ptx_wgmma_commit_group_commit_group_sync_aligned() { emulation::close_products(); }
inline void tvm_builtin_ptx_wgmma_wait_group_wait_group_sync_aligned_0() { emulation::wait_for_products(0); }
inline void tvm_builtin_ptx_wgmma_wait_group_wait_group_sync_aligned_1() { emulation::wait_for_products(1); }
// The last arguments are the two descriptors, and whether sums are added to.
template <class Arguments, size_t... i>
inline void multiply_group(Arguments all, std::index_sequence<i...>, bool left_signed) {
  constexpr size_t count = sizeof...(i);
  if (!std::get<count + 2>(all)) abort();
  emulation::multiply_later<count>({&std::get<i>(all)...}, std::get<count>(all), std::get<count + 1>(all), left_signed);
}
#define EMULATED_GROUP(columns, kind)                                                                                   \
  template <class... All>                                                                                               \
  inline void tvm_builtin_ptx_wgmma_int_ss_mma_async_sync_aligned_m64n##columns##k32_s32_##kind##_s8(All&&... all) {    \
    static_assert(sizeof...(All) == columns / 2 + 3);                                                                   \
    multiply_group(std::forward_as_tuple(all...), std::make_index_sequence<columns / 2>(), #kind[0] == 's');            \
  }
EMULATED_GROUP(64, s8)
EMULATED_GROUP(64, u8)
EMULATED_GROUP(128, s8)
EMULATED_GROUP(128, u8)
#define EMULATED_MULTIPLY(left, right)                                                                                 \
  inline void tvm_builtin_ptx_mma_int_sync_aligned_m16n8k32_row_col_s32_##left##_##right##_s32(                        \
      uint32_t& d0, uint32_t& d1, uint32_t& d2, uint32_t& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,      \
      uint32_t b0, uint32_t b1, uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3) {                                  \
    emulation::multiply({&d0, &d1, &d2, &d3}, {a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}, #left[0] == 's',           \
                        #right[0] == 's');                                                                             \
  }                                                                                                                    \
  inline void tvm_builtin_ptx_mma_int_sync_aligned_m8n8k16_row_col_s32_##left##_##right##_s32(                         \
      uint32_t& d0, uint32_t& d1, uint32_t a, uint32_t b, uint32_t c0, uint32_t c1) {                                  \
    emulation::multiply({&d0, &d1}, {a}, {b}, {c0, c1}, #left[0] == 's', #right[0] == 's');                            \
  }
EMULATED_MULTIPLY(s8, s8)
EMULATED_MULTIPLY(s8, u8)
EMULATED_MULTIPLY(u8, s8)
EMULATED_MULTIPLY(u8, u8)
