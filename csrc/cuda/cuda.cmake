# Machine code for Ampere and Hopper, and PTX that newer devices compile for themselves.
set(architectures ${CMAKE_CUDA_ARCHITECTURES})
enable_language(CUDA)
if(NOT architectures)
  set(architectures 80-real 90a-real 90-virtual)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
    set(architectures 80-real 90a-real 100-virtual)
  endif()
endif()

target_sources(_C PRIVATE cuda/rows_forward.cu cuda/rows_backward.cu)
target_compile_definitions(_C PRIVATE FASTPO_HAS_CUDA)
# A fused multiply-add would round z differently where it is compared and where it is subtracted.
target_compile_options(_C PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--fmad=false -Xptxas=-warn-spills>)
# The runtime is linked in, so the module imports on a machine without driver or toolkit.
set_target_properties(_C PROPERTIES
  CUDA_ARCHITECTURES "${architectures}"
  CUDA_STANDARD 17
  CUDA_STANDARD_REQUIRED ON
  CUDA_RUNTIME_LIBRARY Static
  CUDA_VISIBILITY_PRESET hidden)
