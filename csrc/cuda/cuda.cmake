# Machine code for Ampere and Hopper, and PTX that newer devices compile for themselves.
set(architectures ${CMAKE_CUDA_ARCHITECTURES})
enable_language(CUDA)
if(NOT architectures)
  set(architectures 80-real 90a-real 90-virtual)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
    set(architectures 80-real 90a-real 100-virtual)
  endif()
endif()

# Linked in, so that the module imports on a machine without driver or toolkit.
if(NOT CMAKE_CUDA_RUNTIME_LIBRARY)
  set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
endif()

target_sources(_C PRIVATE cuda/rows_forward.cu cuda/rows_backward.cu)
target_compile_definitions(_C PRIVATE FASTPO_HAS_CUDA)
# A fused multiply-add would round z differently where it is compared and where it is subtracted.
target_compile_options(_C PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--fmad=false -Xptxas=-warn-spills>)
# The anchored product needs the headers of CUTLASS 3 or 4: FASTPO_CUTLASS names their folder, AUTO
# looks into the package nvidia-cutlass of the Python that builds, OFF does without. A minute of nvcc
# for each file.
set(FASTPO_CUTLASS AUTO CACHE STRING "CUTLASS headers: AUTO, OFF or a folder")
set(cutlass ${FASTPO_CUTLASS})
if(cutlass STREQUAL "AUTO")
  execute_process(COMMAND ${Python_EXECUTABLE} -c
    "import importlib.util as u; print(u.find_spec('cutlass_library').submodule_search_locations[0])"
    OUTPUT_VARIABLE package ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
  set(cutlass "${package}/source/include")
endif()
if(EXISTS "${cutlass}/cutlass/cutlass.h" AND CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.4)
  add_library(anchored OBJECT cuda/anchored.cu
    cuda/anchored_cooperative.cu cuda/anchored_cooperative_stats.cu
    cuda/anchored_pingpong.cu cuda/anchored_pingpong_stats.cu)
  target_include_directories(anchored PRIVATE include)
  target_include_directories(anchored SYSTEM PRIVATE "${cutlass}")
  set(hopper ${architectures})
  list(FILTER hopper INCLUDE REGEX "^90a")
  if(NOT hopper)
    set(hopper 90a-real)
  endif()
  # With assertions the kernel holds function calls, and its products would wait for one another.
  target_compile_options(anchored PRIVATE --expt-relaxed-constexpr -DNDEBUG -Xptxas=-warn-spills)
  set_target_properties(anchored PROPERTIES
    CUDA_ARCHITECTURES "${hopper}"
    CUDA_STANDARD 17
    CUDA_STANDARD_REQUIRED ON
    CUDA_RUNTIME_LIBRARY ${CMAKE_CUDA_RUNTIME_LIBRARY}
    CUDA_VISIBILITY_PRESET hidden
    POSITION_INDEPENDENT_CODE ON)
  target_sources(_C PRIVATE $<TARGET_OBJECTS:anchored>)
  # TMA descriptors are encoded by the driver, whose functions the runtime looks up.
  target_compile_definitions(_C PRIVATE FASTPO_HAS_CUTLASS)
elseif(NOT FASTPO_CUTLASS MATCHES "^(AUTO|OFF)$")
  message(FATAL_ERROR "FASTPO_CUTLASS: expected AUTO, OFF or a folder with cutlass/cutlass.h, got ${FASTPO_CUTLASS}")
endif()

set_target_properties(_C PROPERTIES
  CUDA_ARCHITECTURES "${architectures}"
  CUDA_STANDARD 17
  CUDA_STANDARD_REQUIRED ON
  CUDA_RUNTIME_LIBRARY ${CMAKE_CUDA_RUNTIME_LIBRARY}
  CUDA_VISIBILITY_PRESET hidden)
