// A CUDA device that is not there, for torch's build without CUDA: enough of one for tensors without content
// (FakeTensorMode) to go forward and backward on it. No memory, no kernel, one stream on which everything is done.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;

const Device kOnly(DeviceType::CUDA, 0);

// The autograd engine asks for streams and events of the device that a node's tensors are on.
class AbsentDevice final : public c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
 public:
  Device exchangeDevice(Device) const override { return kOnly; }
  Device getDevice() const override { return kOnly; }
  Stream getStream(Device) const noexcept override { return only(); }
  Stream getNewStream(Device, int) const override { return only(); }
  Stream exchangeStream(Stream) const noexcept override { return only(); }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }

 private:
  static Stream only() { return Stream(Stream::DEFAULT, kOnly); }
};

// What torch asks before it believes that there is a device at all.
class AbsentHooks final : public at::CUDAHooksInterface {
 public:
  explicit AbsentHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};

const bool is_registered = [] {
  c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(new AbsentDevice());
  return true;
}();

}  // namespace

namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, ::AbsentHooks)
}  // namespace at
