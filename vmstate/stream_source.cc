#include "vmstate/stream_source.h"

namespace qvmstate::vmstate {

Result<StreamRun> StreamSource::run_at(StreamOffset /*offset*/, uint64_t bytes) {
  return StreamRun{StreamRun::Kind::other, bytes, HostOffset(0)};
}

}  // namespace qvmstate::vmstate
