/// cuda_runtime.h - stands in for NVIDIA's header of this name when kernels run on the CPU.
#pragma once
#include "cuda_on_cpu.h"
