"""A CUDA device that is not there: torch's fake tensors on cuda:0, and their values on the host.

Every operation runs twice. Once on torch's own fake tensors, which say `cuda:0`, refuse to be mixed
with tensors of the host, and take part in autocast and autograd as those of a device do; and once
on their values. What goes up and down and makes the host wait is counted, memory that nobody has
written holds NaN, a copy that need not be waited for has not happened until it is, and the
driver's calls answer as those of a card would: a device without its index is refused where torch
refuses it.

It is long because it is one device: what a kernel takes, what memory holds and what the driver says
change together.
"""

import threading
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten

MB = 2**20

# Operators whose CUDA kernels take floating point alone, and those that take no wide unsigned type.
_FLOATING_ONLY = {
    aten.avg_pool2d,
    aten.replication_pad2d,
    aten.convolution,
    aten.cudnn_convolution_relu,
    aten.cudnn_convolution_add_relu,
    aten.grid_sampler_2d,
    aten.max_pool2d_with_indices,
    aten.upsample_bicubic2d,
    aten.upsample_bilinear2d,
    aten.sigmoid,
    aten.sigmoid_,
    aten._softmax,
}
_WIDE_UNSIGNED = {torch.uint16, torch.uint32, torch.uint64}

_TAKES_HOST = {aten._to_copy, aten.copy_, aten.index, aten.index_put_}
_UNKNOWN_SIZE = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
_FUSED = {aten.cudnn_convolution_relu, aten.cudnn_convolution_add_relu}


class _FakeMode(FakeTensorMode):
    """Fake tensors that never look for a device, whatever `torch.cuda.is_available` says."""

    avoid_device_init = True


@dataclass
class Traffic:
    """What crossed between host and device.

    Attributes:
        uploads, downloads: (shape, type) of each tensor that went up or came down.
        waits: operations after which the host had to wait for the device.
        fractions: arguments of the allocator's limit, (fraction, device).
    """

    uploads: list = field(default_factory=list)
    downloads: list = field(default_factory=list)
    waits: list = field(default_factory=list)
    fractions: list = field(default_factory=list)


class FakeCuda(TorchDispatchMode):
    """The device, while the mode is entered.

    Args:
        total_mb: its memory.
        context_mb: taken of it by the context.
        fused: whether its cuDNN has the fused kernels; a function of the operator and its first
            argument's number of channels may decide for each call.
    """

    def __init__(self, *, total_mb=24000.0, context_mb=400.0, fused=True):
        super().__init__()
        self.total_mb, self.context_mb = total_mb, context_mb
        self.fused = fused if callable(fused) else lambda operator, channels: fused
        self.traffic = Traffic()
        self.operators = []  # every operator that ran on the device, in order
        self._fakes = _FakeMode(allow_non_fake_inputs=False)
        self._lock = threading.RLock()
        self._pinned = set()
        self._pending = []  # copies to the host that have not happened yet

    # Operations.

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        options = dict(options or {})
        leaves = tree_leaves((arguments, options))
        if operator.overloadpacket is aten.is_pinned:
            return arguments[0].untyped_storage().data_ptr() in self._pinned
        if operator is torch.ops.prim.device.default:
            of = arguments[0]
            return of.fake_device if isinstance(of, FakeTensor) else torch.device("cpu")
        to_device = any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves)
        if not to_device and not any(isinstance(leaf, FakeTensor) for leaf in leaves):
            pinned = options.pop("pin_memory", False)
            result = operator(*arguments, **options)
            if pinned:
                self._pinned.add(result.untyped_storage().data_ptr())
            return result
        if torch._C._dispatch_has_kernel_for_dispatch_key(
            operator.name(), "CompositeImplicitAutograd"
        ):  # in inference mode torch does not take these apart itself
            with self:
                taken_apart = operator.decompose(*arguments, **options)
            if taken_apart is not NotImplemented:
                return taken_apart
        with self._lock:
            return self._on_device(operator, arguments, options)

    def _on_device(self, operator, arguments, options):
        packet = operator.overloadpacket
        leaves = tree_leaves((arguments, options))
        target = options.get("device")
        if packet is aten._local_scalar_dense:
            self._wait(operator)
            return arguments[0].values.item()
        if packet is aten._to_copy and target is not None and torch.device(target).type == "cpu":
            return self._download(operator, arguments[0], options)
        if packet is aten.copy_ and not isinstance(arguments[0], FakeTensor):
            return self._copy_down(operator, *arguments, **options)
        if packet is aten._to_copy and not isinstance(arguments[0], FakeTensor):
            source = arguments[0]
            self.traffic.uploads.append((tuple(source.shape), source.dtype))
            if not (options.get("non_blocking") and self._is_pinned(source)):
                self._wait(operator)
        elif packet is aten.copy_ and not isinstance(arguments[1], FakeTensor):
            self.traffic.uploads.append((tuple(arguments[1].shape), arguments[1].dtype))
            self._wait(operator)
        self._check(packet, arguments)
        self.operators.append(packet)
        if packet is aten.index:
            unknown_size = any(
                index is not None and index.dtype == torch.bool for index in arguments[1]
            )
        else:
            unknown_size = not _UNKNOWN_SIZE.isdisjoint(operator.tags)
        if unknown_size:
            self._wait(operator)
        same = {id(leaf.values): leaf for leaf in leaves if isinstance(leaf, FakeTensor)}
        result = self._compute(operator, arguments, options)
        return tree_map(lambda v: same[id(v)] if id(v) in same else self._wrap(v), result)

    def _wrap(self, values):
        if not isinstance(values, torch.Tensor):
            return values
        with torch.inference_mode(False):  # what a view of a tensor made outside of it must be
            meta = torch.empty_strided(
                values.shape, values.stride(), dtype=values.dtype, device="meta"
            )
            fake = FakeTensor(self._fakes, meta, torch.device("cuda:0"))
        fake.values = values
        return fake

    def _compute(self, operator, arguments, options):
        """The operation on the values, on the host."""

        def valued(leaf):
            return leaf.values if isinstance(leaf, FakeTensor) else leaf

        arguments, options = tree_map(valued, (arguments, options))
        if "device" in options:
            options["device"] = torch.device("cpu")
        options.pop("pin_memory", None)
        packet = operator.overloadpacket
        if packet is aten.cudnn_convolution_relu:
            features, weight, bias, stride, padding, dilation, groups = arguments
            layer = functional.conv2d(features, weight, bias, stride, padding, dilation, groups)
            return _written_over(functional.relu(layer))
        if packet is aten.cudnn_convolution_add_relu:
            features, weight, total, alpha, bias, stride, padding, dilation, groups = arguments
            layer = functional.conv2d(features, weight, bias, stride, padding, dilation, groups)
            return _written_over(functional.relu(layer + (1 if alpha is None else alpha) * total))
        if packet is aten.cudnn_batch_norm:
            *inputs, training, momentum, epsilon = arguments
            result = aten.native_batch_norm(*inputs, training, momentum, epsilon)
            return (*result, torch.empty(0, dtype=torch.uint8))
        if packet is aten.cudnn_batch_norm_backward:
            features, gradient, weight, *statistics, epsilon, _ = arguments
            whole = [True, True, True]
            return aten.native_batch_norm_backward(
                gradient, features, weight, *statistics, True, epsilon, whole
            )
        result = operator(*arguments, **options)
        if packet in (aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty):
            result.fill_(float("nan") if result.is_floating_point() else 77)
        return result

    def _check(self, packet, arguments):
        """Refuse what a device refuses: tensors of the host, types and kernels that it lacks."""
        for tensor in tree_leaves(arguments):
            if not isinstance(tensor, torch.Tensor):
                continue
            if not isinstance(tensor, FakeTensor):
                if tensor.ndim and packet not in _TAKES_HOST:
                    raise RuntimeError(f"{packet}: tensors on two devices")
                continue
            wide = tensor.dtype in _WIDE_UNSIGNED and packet is not aten._to_copy
            if wide or (packet in _FLOATING_ONLY and not tensor.is_floating_point()):
                raise NotImplementedError(f'"{packet}" not implemented for {tensor.dtype}')
        if packet in _FUSED and not self.fused(packet, arguments[0].shape[1]):
            raise RuntimeError("GET was unable to find an engine to execute this computation")

    def _is_pinned(self, tensor):
        return tensor.untyped_storage().data_ptr() in self._pinned

    def _download(self, operator, source, options):
        self._wait(operator)
        self.traffic.downloads.append((tuple(source.shape), source.dtype))
        options = {name: value for name, value in options.items() if name == "dtype" and value}
        return source.values.clone().to(**options) if options else source.values.clone()

    def _copy_down(self, operator, target, source, non_blocking=False):
        self.traffic.downloads.append((tuple(source.shape), source.dtype))
        if non_blocking and self._is_pinned(target):
            target.fill_(float("nan") if target.is_floating_point() else 99)
            self._pending.append((target, source.values.clone()))
        else:
            self._wait(operator)
            target.copy_(source.values)
        return target

    def _wait(self, why):
        self.traffic.waits.append(str(why))
        self.finish(len(self._pending))

    def finish(self, count):
        """Let the first copies of those under way happen."""
        for target, values in self._pending[:count]:
            target.copy_(values)
        del self._pending[:count]

    # The driver.

    def install(self, monkeypatch):
        """Let torch's calls of the driver be answered by this device."""
        device = self
        if not torch.cuda.is_available():
            torch._C._ensureCUDADeviceGuardSet()
        done = []  # copies that have happened, so that an event knows which were before it

        class Event:
            def __init__(self, **options):
                self.before = 0

            def record(self, stream=None):
                self.before = len(done) + len(device._pending)

            def synchronize(self):
                device.traffic.waits.append("event")
                count = max(0, self.before - len(done))
                done.extend(device._pending[:count])
                device.finish(count)

            def query(self):
                return self.before <= len(done)

        def check(index):
            assert type(index) is int and index == 0, f"no device {index!r}"

        def limit(fraction, index):
            check(index)
            self.traffic.fractions.append((fraction, index))

        def memory_info(index):
            check(index)
            free = self.total_mb - self.context_mb
            return int(free * MB), int(self.total_mb * MB)

        def stats(index):
            check(index)
            both = {"current": 100 * MB, "peak": 200 * MB, "allocated": 0, "freed": 0}
            return {
                name: {"all": dict(both), "small_pool": dict(both), "large_pool": dict(both)}
                for name in ("allocated_bytes", "reserved_bytes", "active_bytes")
            }

        for name, value in {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "_lazy_init": lambda: None,
            "set_device": lambda device: None,
            "get_device_name": lambda device=None: "Fake Card",
            "is_bf16_supported": lambda including_emulation=True: True,
            "cudart": lambda: SimpleNamespace(cudaMemGetInfo=memory_info),
            "synchronize": lambda device=None: self._wait("synchronize"),
            "current_stream": lambda device=None: SimpleNamespace(
                synchronize=lambda: self._wait("stream")
            ),
            "Event": Event,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda.memory, "is_initialized", lambda: True, raising=False)
        monkeypatch.setattr(torch.cuda.memory, "_lazy_init", lambda: None, raising=False)
        for name, value in {
            "_cuda_setMemoryFraction": limit,
            "_cuda_memoryStats": stats,
            "_cuda_resetPeakMemoryStats": check,
        }.items():
            monkeypatch.setattr(torch._C, name, value, raising=False)

        monkeypatch.setattr(torch, "Generator", lambda device="cpu": torch._C.Generator())

        def pin(tensor, device=None):
            copy = tensor.clone()
            self._pinned.add(copy.untyped_storage().data_ptr())
            return copy

        monkeypatch.setattr(torch.Tensor, "pin_memory", pin)

        # Modes are a thread's own: work handed to a thread takes this one along.
        import concurrent.futures.thread as pool

        run = pool._WorkItem.run

        def run_with_device(item, *more):
            with self:
                run(item, *more)

        monkeypatch.setattr(pool._WorkItem, "run", run_with_device)

        def copied(tensor, memo):
            if id(tensor) not in memo:
                copy = tensor.detach().clone().requires_grad_(tensor.requires_grad)
                copy._is_param = getattr(tensor, "_is_param", False)
                memo[id(tensor)] = copy
            return memo[id(tensor)]

        monkeypatch.setattr(FakeTensor, "__deepcopy__", copied)  # theirs copies the mode too

        def swap(tensor, other):
            tensor.data = other.detach()
            tensor.values = other.values

        monkeypatch.setattr(torch.utils, "swap_tensors", swap)  # for modules that change their type

        save, load = torch.save, torch.load

        def save_values(content, *more, **options):
            save(tree_map(_values_of, content), *more, **options)

        def load_values(path, map_location=None, **options):
            content = load(path, map_location="cpu", **options)
            if map_location is None or torch.device(map_location).type == "cpu":
                return content
            return tree_map(
                lambda leaf: leaf.to("cuda:0") if isinstance(leaf, torch.Tensor) else leaf, content
            )

        monkeypatch.setattr(torch, "save", save_values)
        monkeypatch.setattr(torch, "load", load_values)


def _values_of(leaf):
    return leaf.values.detach() if isinstance(leaf, FakeTensor) else leaf


def _written_over(result):
    """The result in memory that held NaN before: a kernel that reads what it is given shows it."""
    poisoned = torch.full_like(result, float("nan"))
    return poisoned.copy_(result)


def backward(root, *_, **__):
    """`root.backward()` without torch's engine, which asks the driver about streams.

    The nodes are torch's own; what its engine does between them is done here: gradients are added
    up, summed over what was broadcast, and of the type and on the device of what they belong to.
    """
    first = (root.grad_fn, root.output_nr)
    waiting, seen, unvisited = {}, {root.grad_fn}, [root.grad_fn]
    while unvisited:
        for node, _ in unvisited.pop().next_functions:
            if node is not None:
                waiting[node] = waiting.get(node, 0) + 1
                if node not in seen:
                    seen.add(node)
                    unvisited.append(node)
    gradients = {first[0]: {first[1]: torch.ones_like(root)}}
    ready = [first[0]]
    while ready:
        node = ready.pop()
        arrived = gradients.pop(node, {})
        inputs = [arrived.get(number) for number in range(len(node._input_metadata))]
        if hasattr(node, "variable"):
            leaf = node.variable
            with torch.no_grad():
                leaf.grad = inputs[0] if leaf.grad is None else leaf.grad + inputs[0]
            continue
        with torch.no_grad():
            outputs = node(*inputs) if any(part is not None for part in inputs) else None
        if not isinstance(outputs, tuple):
            outputs = (outputs,) * len(node.next_functions)
        for (following, number), gradient in zip(node.next_functions, outputs, strict=True):
            if following is None:
                continue
            if gradient is not None:
                wanted = following._input_metadata[number]
                assert gradient.device == wanted.device, (gradient.device, wanted.device)
                with torch.no_grad():
                    gradient = gradient.sum_to_size(wanted.shape).to(wanted.dtype)
                    sums = gradients.setdefault(following, {})
                    sums[number] = sums[number] + gradient if number in sums else gradient
            waiting[following] -= 1
            if waiting[following] == 0:
                ready.append(following)


def entered(device, monkeypatch):
    """Install a device and enter its mode; leave by closing what is returned."""
    device.install(monkeypatch)
    stack = ExitStack()
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    only_host = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    stack.callback(torch._C._set_only_lift_cpu_tensors, only_host)
    stack.enter_context(device)
    return stack
