# Machine code for Ampere and Hopper, and PTX that newer devices compile for themselves.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90a-real 90-virtual)
endif()
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)

target_sources(_C PRIVATE cuda/rows_forward.cu cuda/rows_backward.cu)
target_compile_definitions(_C PRIVATE FASTPO_HAS_CUDA)
# The runtime is linked in, so the module imports on a machine without driver or toolkit.
# The target is older than the language, so it has not inherited the architectures.
set_target_properties(_C PROPERTIES CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES}"
  CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden)
