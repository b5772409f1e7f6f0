// There is no device to choose.
#pragma once
namespace tvm { namespace ffi {
struct CUDADeviceGuard { explicit CUDADeviceGuard(int) {} };
}}  // namespace tvm::ffi
