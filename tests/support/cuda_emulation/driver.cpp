// NVIDIA's driver library as far as tvm_backend/gpu/driver.py calls it, with the CPU's memory for the device's.
// Memory is poisoned when it is handed out, and ends at a page that nobody may touch.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <map>
#include <vector>

namespace {
struct Block { char* start; size_t length; };
std::map<uint64_t, Block> blocks;

typedef std::vector<std::function<void()>> Recorded;
Recorded* capturing = nullptr;
// The driver's own stream, another one that a caller might have, and whether an address is one of them.
char streams[2];
bool known(void* on) { return on == &streams[0] || on == &streams[1]; }
struct Event { bool timed; double seconds; };
std::map<uint64_t, Event> events;
uint64_t last_event = 0x1000;
}  // namespace

extern "C" {
int cuInit(unsigned) { return 0; }
int cuDeviceGetCount(int* count) { *count = 1; return 0; }
int cuDeviceGet(int* device, int number) { *device = number; return 0; }
int cuDevicePrimaryCtxRetain(void** context, int) { *context = &blocks; return 0; }
int cuCtxSetCurrent(void* context) { return context == &blocks ? 0 : 201; }
int cuDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == 75 ? 9 : attribute == 16 ? 1 : 0;
  return 0;
}
int cuDeviceGetName(char* text, int length, int) { strncpy(text, "emulated device", length); return 0; }
int cuDriverGetVersion(int* version) { *version = 12040; return 0; }
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
void* emulation_other_stream() { return &streams[1]; }
int cuStreamCreate(void** made, unsigned) { *made = &streams[0]; return 0; }
int cuStreamSynchronize(void* on) { return known(on) ? 0 : 1; }
int cuEventCreate(void** made, unsigned flags) { events[++last_event] = {flags == 0, 0}; *made = (void*)last_event; return 0; }
int cuEventRecord(void* event, void* on) {
  if (!known(on) || !events.count((uint64_t)event)) return 1;
  events[(uint64_t)event].seconds = clock() / (double)CLOCKS_PER_SEC;
  return 0;
}
int cuEventElapsedTime(float* ms, void* start, void* end) {
  const Event &first = events.at((uint64_t)start), &second = events.at((uint64_t)end);
  *ms = 1000 * (second.seconds - first.seconds);
  return first.timed && second.timed ? 0 : 1;
}
int cuStreamWaitEvent(void* on, void* event, unsigned) { return known(on) && events.count((uint64_t)event) ? 0 : 1; }
int cuEventSynchronize(void* event) { return events.count((uint64_t)event) ? 0 : 1; }
int cuMemAllocHost_v2(void** address, size_t size) { *address = malloc(size); return 0; }
int cuMemcpyHtoDAsync_v2(uint64_t target, const void* source, size_t size, void* on) {
  if (!known(on) || capturing) return 1;
  memcpy((void*)target, source, size);
  return 0;
}
int cuMemcpyDtoDAsync_v2(uint64_t target, uint64_t source, size_t size, void* on) {
  if (!known(on) || capturing) return 1;
  memcpy((void*)target, (const void*)source, size);
  return 0;
}
int cuMemsetD8Async(uint64_t target, unsigned char value, size_t size, void* on) {
  if (!known(on) || capturing) return 1;
  memset((void*)target, value, size);
  return 0;
}
int cuMemcpyDtoHAsync_v2(void* target, uint64_t source, size_t size, void* on) {
  if (!known(on) || capturing) return 1;
  memcpy(target, (const void*)source, size);
  return 0;
}

// Kernels come here from the libraries that launch them: 0 runs one at once, 1 keeps it for the graph, 2 is a refusal.
int emulation_launched(void* on, void (*run)(void*), void* closure) {
  if (!known(on)) return 2;
  if (!capturing) return 0;
  capturing->push_back([=]() { run(closure); });
  return 1;
}
int cuStreamBeginCapture_v2(void* on, int) {
  if (!known(on) || capturing) return 1;
  capturing = new Recorded();
  return 0;
}
int cuStreamEndCapture(void* on, void** graph) {
  if (!known(on) || !capturing) return 1;
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
  if (!known(on) || capturing) return 1;
  for (const auto& kernel : *(Recorded*)graph) kernel();
  return 0;
}
}
