// NVIDIA's driver library as far as tvm_backend/gpu/driver.py calls it, with the CPU's memory for the device's.
// Memory is poisoned when it is handed out, and ends at a page that nobody may touch.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <vector>

namespace {
struct Block { char* start; size_t length; };
std::map<uint64_t, Block> blocks;

typedef std::vector<std::function<void()>> Recorded;
Recorded* capturing = nullptr;
char stream;
}  // namespace

extern "C" {
int cuInit(unsigned) { return 0; }
int cuDeviceGetCount(int* count) { *count = 1; return 0; }
int cuDeviceGet(int* device, int number) { *device = number; return 0; }
int cuDevicePrimaryCtxRetain(void** context, int) { *context = &blocks; return 0; }
int cuCtxSetCurrent(void* context) { return context == &blocks ? 0 : 201; }
int cuDeviceGetAttribute(int* value, int attribute, int) { *value = attribute == 75 ? 9 : 0; return 0; }
int cuGetErrorString(int code, const char** text) { *text = code == 2 ? "out of memory" : "invalid value"; return 0; }
int cuMemAlloc_v2(uint64_t* address, size_t size) {
  if (size > (size_t(1) << 34)) return 2;
  // Addresses are multiples of 256 as CUDA's are, so up to 255 bytes beyond the end are not guarded.
  size_t page = sysconf(_SC_PAGESIZE), rounded = (size + 255) / 256 * 256, room = (rounded + page - 1) / page * page;
  char* start = (char*)mmap(nullptr, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) return 2;
  mprotect(start + room, page, PROT_NONE);
  memset(start, 0x5a, room);
  *address = (uint64_t)(start + room - rounded);
  blocks[*address] = {start, room + page};
  return 0;
}
int cuMemFree_v2(uint64_t address) {
  auto found = blocks.find(address);
  if (found == blocks.end()) return 1;
  munmap(found->second.start, found->second.length);
  blocks.erase(found);
  return 0;
}
int cuStreamCreate(void** made, unsigned) { *made = &stream; return 0; }
int cuStreamSynchronize(void* on) { return on == &stream ? 0 : 1; }
int cuMemcpyHtoDAsync_v2(uint64_t target, const void* source, size_t size, void* on) {
  if (on != &stream || capturing) return 1;
  memcpy((void*)target, source, size);
  return 0;
}
int cuMemcpyDtoHAsync_v2(void* target, uint64_t source, size_t size, void* on) {
  if (on != &stream || capturing) return 1;
  memcpy(target, (const void*)source, size);
  return 0;
}

// Kernels come here from the libraries that launch them: 0 runs one at once, 1 keeps it for the graph, 2 is a refusal.
int emulation_launched(void* on, void (*run)(void*), void* closure) {
  if (on != &stream) return 2;
  if (!capturing) return 0;
  capturing->push_back([=]() { run(closure); });
  return 1;
}
int cuStreamBeginCapture_v2(void* on, int) {
  if (on != &stream || capturing) return 1;
  capturing = new Recorded();
  return 0;
}
int cuStreamEndCapture(void* on, void** graph) {
  if (on != &stream || !capturing) return 1;
  *graph = capturing;
  capturing = nullptr;
  return 0;
}
int cuGraphInstantiateWithFlags(void** made, void* graph, unsigned long long) {
  *made = new Recorded(*(Recorded*)graph);
  return 0;
}
int cuGraphDestroy(void* graph) { delete (Recorded*)graph; return 0; }
int cuGraphExecDestroy(void* graph) { delete (Recorded*)graph; return 0; }
int cuGraphLaunch(void* graph, void* on) {
  if (on != &stream || capturing) return 1;
  for (const auto& kernel : *(Recorded*)graph) kernel();
  return 0;
}
}
