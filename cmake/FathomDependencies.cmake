# Every third-party library, found once. A missing one stops the configuration with its package's name. The installed
# package uses this file too (FathomConfig.cmake.in): what has no CMake package is an imported target fathom::NAME, which
# both make the same way.
find_package(Threads REQUIRED)

function(fathom_missing name debian)
  message(FATAL_ERROR "Fathom needs ${name}, which was not found. On Debian and Ubuntu: apt-get install ${debian}\n"
                      "(scripts/setup.sh installs everything that is missing.)")
endfunction()

# fathom_find(PACKAGE TARGET DEBIAN): find_package in config or module mode; TARGET must exist afterwards.
macro(fathom_find package target debian)
  find_package(${package} QUIET)
  if(NOT TARGET ${target})
    fathom_missing("${package}" "${debian}")
  endif()
endmacro()

# fathom_imported(TARGET INCLUDES LIBRARIES): fathom::TARGET.
function(fathom_imported target includes libraries)
  if(NOT TARGET fathom::${target})
    add_library(fathom::${target} INTERFACE IMPORTED GLOBAL)
    set_target_properties(fathom::${target} PROPERTIES
      INTERFACE_INCLUDE_DIRECTORIES "${includes}" INTERFACE_LINK_LIBRARIES "${libraries}")
  endif()
endfunction()

# fathom_find_library(TARGET HEADER LIBRARY DEBIAN): for libraries that ship no CMake package.
function(fathom_find_library target header library debian)
  find_path(fathom_${target}_INCLUDE_DIR ${header} PATH_SUFFIXES openblas-openmp openblas)
  find_library(fathom_${target}_LIBRARY ${library})
  mark_as_advanced(fathom_${target}_INCLUDE_DIR fathom_${target}_LIBRARY)
  if(NOT fathom_${target}_INCLUDE_DIR OR NOT fathom_${target}_LIBRARY)
    fathom_missing("${library} (${header})" "${debian}")
  endif()
  fathom_imported(${target} "${fathom_${target}_INCLUDE_DIR}" "${fathom_${target}_LIBRARY}")
endfunction()

fathom_find(CLI11 CLI11::CLI11 libcli11-dev)
fathom_find(fmt fmt::fmt libfmt-dev)
fathom_find(spdlog spdlog::spdlog libspdlog-dev)
fathom_find(nlohmann_json nlohmann_json::nlohmann_json nlohmann-json3-dev)
fathom_find(ZLIB ZLIB::ZLIB zlib1g-dev)
fathom_find(LibLZMA LibLZMA::LibLZMA liblzma-dev)

# Beast and Asio, headers alone, by Boost's own package (CMake's module for it is going away).
find_package(Boost 1.74 QUIET CONFIG)
if(NOT TARGET Boost::headers)
  fathom_missing("Boost 1.74 or later (its headers)" libboost-dev)
endif()

fathom_find(OpenSSL OpenSSL::SSL libssl-dev)

# Its target has a namespace from 0.8 on.
find_package(yaml-cpp QUIET)
if(TARGET yaml-cpp::yaml-cpp)
  fathom_imported(yaml_cpp "" yaml-cpp::yaml-cpp)
elseif(TARGET yaml-cpp)
  fathom_imported(yaml_cpp "" yaml-cpp)
else()
  fathom_missing(yaml-cpp libyaml-cpp-dev)
endif()

find_package(HDF5 QUIET COMPONENTS C)
if(NOT HDF5_FOUND)
  fathom_missing(HDF5 libhdf5-dev)
endif()
fathom_imported(hdf5 "${HDF5_C_INCLUDE_DIRS}" "${HDF5_C_LIBRARIES}")

fathom_find_library(openblas cblas.h openblas libopenblas-openmp-dev)
fathom_find_library(zstd zstd.h zstd libzstd-dev)
fathom_find_library(xxhash xxhash.h xxhash libxxhash-dev)
fathom_find_library(pcre2 pcre2.h pcre2-8 libpcre2-dev)
fathom_find_library(sentencepiece sentencepiece_processor.h sentencepiece libsentencepiece-dev)
fathom_find_library(sentencepiece_train sentencepiece_trainer.h sentencepiece_train libsentencepiece-dev)

if(FATHOM_OPENMP)
  find_package(OpenMP QUIET COMPONENTS CXX)
  if(NOT TARGET OpenMP::OpenMP_CXX)
    fathom_missing("OpenMP for ${CMAKE_CXX_COMPILER_ID}" "g++ (or libomp-dev for clang)")
  endif()
endif()
# MPI's C interface alone; its C++ one is no longer in the standard.
set(FATHOM_HAVE_MPI OFF)
if(NOT FATHOM_MPI STREQUAL "OFF")
  set(MPI_CXX_SKIP_MPICXX ON)
  find_package(MPI QUIET COMPONENTS C)
  if(TARGET MPI::MPI_C)
    set(FATHOM_HAVE_MPI ON)
  elseif(NOT FATHOM_MPI STREQUAL "AUTO")
    fathom_missing("MPI (FATHOM_MPI is ${FATHOM_MPI})" "libopenmpi-dev openmpi-bin")
  endif()
endif()
if(FATHOM_TESTS)
  fathom_find(GTest GTest::gtest "libgtest-dev libgmock-dev")
endif()
if(FATHOM_BENCH)
  fathom_find(benchmark benchmark::benchmark libbenchmark-dev)
endif()
if(FATHOM_CUDA)
  find_package(CUDAToolkit 12.4 QUIET)
  if(NOT TARGET CUDA::cudart_static)
    message(FATAL_ERROR "FATHOM_CUDA is on, and there is no CUDA Toolkit of version 12.4 or later. Put nvcc on PATH or set "
                        "CUDAToolkit_ROOT; the preset cpu builds without it.")
  endif()
endif()
# Attention by cuDNN needs two sets of headers to build; its library is opened at run time (kernels/cuda).
if(FATHOM_CUDA AND FATHOM_CUDNN_ATTENTION)
  find_path(fathom_cudnn_frontend_INCLUDE_DIR cudnn_frontend.h NO_CMAKE_FIND_ROOT_PATH
            HINTS "${FATHOM_CUDNN_FRONTEND}" "${CMAKE_SOURCE_DIR}/.cache/cuda/cudnn-frontend" PATH_SUFFIXES include)
  find_path(fathom_cudnn_INCLUDE_DIR cudnn_graph.h
            HINTS "${FATHOM_CUDNN_INCLUDE}" ${CUDAToolkit_INCLUDE_DIRS} PATH_SUFFIXES include)
  if(NOT fathom_cudnn_INCLUDE_DIR)  # PyTorch brings them along
    execute_process(COMMAND python3 -c "import nvidia.cudnn; print(list(nvidia.cudnn.__path__)[0])"
                    OUTPUT_VARIABLE cudnn_package OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    find_path(fathom_cudnn_INCLUDE_DIR cudnn_graph.h HINTS "${cudnn_package}" PATH_SUFFIXES include)
  endif()
  mark_as_advanced(fathom_cudnn_frontend_INCLUDE_DIR fathom_cudnn_INCLUDE_DIR)
  if(NOT fathom_cudnn_frontend_INCLUDE_DIR)
    message(FATAL_ERROR "The CUDA build needs the headers of cudnn-frontend. scripts/setup-cuda.sh fetches them; or set "
                        "FATHOM_CUDNN_FRONTEND to the folder that holds cudnn_frontend.h. -DFATHOM_CUDNN_ATTENTION=OFF "
                        "builds without: attention is then Fathom's own kernel, which is slower at long sequences.")
  endif()
  if(NOT fathom_cudnn_INCLUDE_DIR)
    message(FATAL_ERROR "The CUDA build needs cuDNN 9's headers. They are in NVIDIA's package libcudnn9-dev-cuda-13 and in "
                        "the Python package nvidia-cudnn-cu13; elsewhere, set FATHOM_CUDNN_INCLUDE to their folder. "
                        "-DFATHOM_CUDNN_ATTENTION=OFF builds without: attention is then Fathom's own kernel, which is "
                        "slower at long sequences.")
  endif()
endif()
# Products of codes by CUTLASS need its headers, and nothing else does: without them Fathom's own kernels do the work.
# Only the version that setup-cuda.sh fetches is known to compile, so other folders are not searched.
if(FATHOM_CUDA AND NOT FATHOM_CUTLASS STREQUAL "OFF")
  set(folders "${CMAKE_SOURCE_DIR}/.cache/cuda/cutlass")
  if(FATHOM_CUTLASS)
    set(folders "${FATHOM_CUTLASS}")
  endif()
  unset(fathom_cutlass_INCLUDE_DIR CACHE)  # another folder may be named
  find_path(fathom_cutlass_INCLUDE_DIR cutlass/gemm/kernel/gemm_universal.hpp
            PATHS ${folders} PATH_SUFFIXES include NO_DEFAULT_PATH)
  mark_as_advanced(fathom_cutlass_INCLUDE_DIR)
  if(FATHOM_CUTLASS AND NOT fathom_cutlass_INCLUDE_DIR)
    message(FATAL_ERROR "FATHOM_CUTLASS is ${FATHOM_CUTLASS}, which does not hold CUTLASS's headers (include/cutlass). "
                        "scripts/setup-cuda.sh --cutlass fetches them; -DFATHOM_CUTLASS=OFF builds without.")
  endif()
endif()
# Several GPUs train by NCCL. Its header is needed to build, its library is opened at run time; without the header the build
# goes on without it.
set(FATHOM_HAVE_NCCL OFF)
set(FATHOM_WHY_NO_NCCL "this build is without it (FATHOM_NCCL is OFF)")
if(FATHOM_CUDA AND NOT FATHOM_NCCL STREQUAL "OFF")
  unset(fathom_nccl_INCLUDE_DIR CACHE)  # another folder may be named
  if(FATHOM_NCCL)
    find_path(fathom_nccl_INCLUDE_DIR nccl.h PATHS "${FATHOM_NCCL}" PATH_SUFFIXES include NO_DEFAULT_PATH)
  else()
    find_path(fathom_nccl_INCLUDE_DIR nccl.h HINTS "${CMAKE_SOURCE_DIR}/.cache/cuda/nccl" ${CUDAToolkit_INCLUDE_DIRS}
              PATH_SUFFIXES include)
  endif()
  mark_as_advanced(fathom_nccl_INCLUDE_DIR)
  if(fathom_nccl_INCLUDE_DIR)
    set(FATHOM_HAVE_NCCL ON)
  elseif(FATHOM_NCCL)
    message(FATAL_ERROR "FATHOM_NCCL is ${FATHOM_NCCL}, which does not hold NCCL's header (nccl.h). scripts/setup-cuda.sh "
                        "--nccl fetches it; -DFATHOM_NCCL=OFF builds without.")
  endif()
  set(FATHOM_WHY_NO_NCCL "this build is without it (scripts/setup-cuda.sh --nccl fetches its header)")
endif()
