// The part of CUDA's runtime that the extension is linked with, without a GPU: kernels are handed
// to who has called fastpo_listen, as PTX text, sizes and addresses of arguments.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <string>

namespace {

constexpr int kSharedMemory = 232448;  // bytes a block may have

using OnLaunch = int(const char* ptx, const char* kernel, const unsigned* sizes, uint64_t shared,
                     void** arguments);
using OnTensor = int(void* out, int type, unsigned rank, uint64_t address, const uint64_t* sizes,
                     const uint64_t* pitches, const unsigned* box, int swizzle);

struct Kernel {
  std::string ptx, name;
};

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};

OnLaunch* on_launch;
OnTensor* on_tensor;
Configuration configured;
cudaError_t last = cudaSuccess;

std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> all;
  return all;
}

// The text within what nvcc --no-compress embeds: a size, a header, sections.
std::string text_of(void** handle) {
  struct Wrapper {
    int magic, version;
    const char* data;
  };
  struct Header {
    uint32_t magic;
    uint16_t version, size;
    uint64_t bytes;
  };
  const char* data = reinterpret_cast<Wrapper*>(handle)->data;
  const auto* header = reinterpret_cast<const Header*>(data);
  const std::string all(data, header->size + header->bytes);
  const size_t start = all.find(".version");
  return start == std::string::npos ? "" : all.substr(start, all.find('\0', start) - start);
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, dim3 cluster, size_t shared,
                   void** arguments) {
  const auto found = kernels().find(function);
  if (found == kernels().end()) return last = cudaErrorInvalidDeviceFunction;
  const unsigned sizes[] = {grid.x,  grid.y,    grid.z,    block.x,  block.y,
                            block.z, cluster.x, cluster.y, cluster.z};
  const Kernel& kernel = found->second;
  const int failed = on_launch(kernel.ptx.c_str(), kernel.name.c_str(), sizes, shared, arguments);
  return last = failed ? cudaErrorLaunchFailure : cudaSuccess;
}

CUresult encode(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* address,
                const cuuint64_t* sizes, const cuuint64_t* pitches, const cuuint32_t* box,
                const cuuint32_t* steps, CUtensorMapInterleave interleave,
                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  for (unsigned i = 0; i < rank; ++i) {
    if (steps[i] != 1) return CUDA_ERROR_INVALID_VALUE;
  }
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  return static_cast<CUresult>(on_tensor(out, type, rank, reinterpret_cast<uint64_t>(address),
                                         reinterpret_cast<const uint64_t*>(sizes),
                                         reinterpret_cast<const uint64_t*>(pitches), box, swizzle));
}

}  // namespace

extern "C" {

void fastpo_listen(OnLaunch* launched, OnTensor* encoded) {
  on_launch = launched;
  on_tensor = encoded;
}

void** __cudaRegisterFatBinary(void* wrapper) { return static_cast<void**>(wrapper); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }  // what nvcc 13.0 makes asks for it, 13.5 does not
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void** handle, const char* host, char*, const char* name, int, void*,
                            void*, void*, void*, int*) {
  kernels()[host] = {text_of(handle), name};
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  configured = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configured.grid;
  *block = configured.block;
  *shared = configured.shared;
  *static_cast<void**>(stream) = configured.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared, cudaStream_t) {
  return launch(kernel, grid, block, dim3(1, 1, 1), shared, arguments);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                void** arguments) {
  dim3 cluster(1, 1, 1);
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const auto& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      const auto& size = attribute.val.clusterDim;
      cluster = dim3(size.x, size.y, size.z);
    }
  }
  return launch(function, config->gridDim, config->blockDim, cluster, config->dynamicSmemBytes,
                arguments);
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = kSharedMemory;
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  const bool known = kernels().count(function) != 0;
  const bool fits = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize
                        ? value <= kSharedMemory
                        : attribute == cudaFuncAttributeNonPortableClusterSizeAllowed;
  return known && fits ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
// Unoptimised code names it, for a workspace that none of our products has.
cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t cudaGetLastError() {
  const cudaError_t found = last;
  last = cudaSuccess;
  return found;
}
const char* cudaGetErrorString(cudaError_t) {
  return "an error of the stand-in for CUDA's runtime";
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  const bool known = std::strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(&encode) : nullptr;
  if (found) *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return known ? cudaSuccess : cudaErrorInvalidValue;
}

}  // extern "C"
