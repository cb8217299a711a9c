# Debian's CMake package of OpenCV needs all its modules, which take 440 MB; these three take a third.
find_path(OpenCV_INCLUDE_DIRS opencv2/imgcodecs.hpp PATH_SUFFIXES opencv4)
set(OpenCV_LIBS)
foreach(module ${OpenCV_FIND_COMPONENTS})
  find_library(OPENCV_${module} opencv_${module})
  list(APPEND OpenCV_LIBS ${OPENCV_${module}})
endforeach()
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(OpenCV REQUIRED_VARS OpenCV_INCLUDE_DIRS OpenCV_LIBS)
