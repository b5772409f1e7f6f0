// Stands in for CUDA's header when generated kernels are compiled for the CPU.
#pragma once
#include "cuda_runtime.h"
