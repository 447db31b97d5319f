"""A second device where there is none: tensors on `npu` are CPU tensors that say they are elsewhere.

It finds what a GPU would: an operation on tensors of two devices raises, and whatever would make the host wait for the device is noted with the line that asked for it.
It models no kernels, no speed and no numerics. It uses a private interface of PyTorch (from 2.14 on); importing it where that is missing raises ImportError.
It changes PyTorch for the whole process, so it needs a process of its own, and it works inside `with Device():` only."""
import importlib.util, traceback
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

PACKAGE = Path(importlib.util.find_spec('cifar_cam').origin).parent
LIBRARIES = '/fastai/', '/pytorch_grad_cam/', '/tests/'

# They read a value, or their result's size depends on one.
READS = {'_local_scalar_dense', 'nonzero', 'masked_select', 'bincount', '_unique2', 'unique_dim', 'unique_consecutive', 'equal', 'is_nonzero',
         'repeat_interleave', 'linalg_eigh', '_linalg_eigh', '_linalg_svd'}
COPIES = {'_to_copy', 'copy_', '_copy_from', '_copy_from_and_resize'}
INDEXES = {'index', 'index_put', 'index_put_', '_index_put_impl_', '_unsafe_index'}
# They make no kernel run: other views of the same memory, memory without contents, bookkeeping.
FREE = {'view', '_unsafe_view', 't', 'transpose', 'permute', 'slice', 'select', 'unsqueeze', 'squeeze', 'expand', 'as_strided', 'detach', 'alias', 'unbind',
        'split', 'split_with_sizes', 'chunk', 'reshape', '_reshape_alias', 'lift_fresh', 'empty', 'empty_like', 'new_empty', 'new_empty_strided', 'empty_strided',
        'unfold', 'is_same_size', '_record_function_enter_new', '_record_function_exit'}


class Wait(NamedTuple):
    "What made the host wait, and the line of the package, else of a library, that asked for it"
    what: str
    where: str


def asking_line():
    frames = [f for f in traceback.extract_stack() if Path(f.filename) != Path(__file__)]
    ours = [f for f in frames if f.filename.startswith(str(PACKAGE))]
    theirs = [f for f in frames if any(o in f.filename for o in LIBRARIES)]
    f = (ours or theirs or frames)[-1]
    last = (theirs or frames)[-1]
    by = '' if last is f else f', in {Path(last.filename).name}:{last.lineno}'
    return f'{Path(f.filename).name}:{f.lineno} {f.name}{by}'


class Device(TorchDispatchMode):
    "Inside, `npu` is a device. What happened is kept on the class: `waits`, and `launches`, a counter of kernels by name"
    waits,launches = [],Counter()
    _pinned,_under_way,_copies = {},{},0

    @classmethod
    def clear(cls):
        cls.waits.clear()
        cls.launches.clear()

    @classmethod
    def note(cls, what): cls.waits.append(Wait(what, asking_line()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if any(isinstance(t, There) for t in tensors) or _is_there(kwargs.get('device')): return run_there(func, args, kwargs)
        self._may_read(func, tensors)
        return func(*args, **kwargs)

    @classmethod
    def _may_read(cls, func, tensors):
        "The host reads a copy from the device before an event has said that it arrived"
        if cls._under_way and _name(func) not in FREE and any(_memory(t) in cls._under_way for t in tensors if not isinstance(t, There)):
            cls.note(f'{_name(func)} of a copy that may not have arrived')

    @classmethod
    def pin(cls, t):
        if not isinstance(t, There) and t.numel(): cls._pinned[_memory(t)] = t  # kept, so that no other tensor gets this memory
        return t

    @classmethod
    def is_pinned(cls, t): return not t.numel() or _memory(t) in cls._pinned


def _name(func): return func._schema.name.split('::')[1]
def _memory(t): return t.untyped_storage().data_ptr()
def _is_there(device): return device is not None and torch.device(device).type == 'npu'


class There(torch.Tensor):
    "A tensor that says it is on `npu`; its values are in the CPU tensor `here`"
    @staticmethod
    def __new__(cls, here):
        t = torch.Tensor._make_wrapper_subclass(cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(),
                                                dtype=here.dtype, device='npu:0')
        t.here = here
        return t

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None): return run_there(func, args, kwargs or {})

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs)  # with a `__torch_dispatch__` of its own a class has none otherwise

    def __format__(self, spec): return format(self.item(), spec) if self.dim() == 0 else repr(self)
    def __repr__(self): return f'There({tuple(self.shape)}, {self.dtype})'
    def __reduce_ex__(self, protocol): return self.here.requires_grad_(self.requires_grad).__reduce_ex__(protocol)

    def set_meta(self, x, as_copy=False):
        "fastai gives what it computes the attributes of what it was computed from"
        self.__dict__.update({k: v for k,v in vars(x).items() if k != 'here'})

    def tolist(self):
        Device.note('tolist')
        return self.here.tolist()

    def numpy(self): raise TypeError("can't convert npu:0 device type tensor to numpy")
    def __array__(self, *args, **kwargs): self.numpy()


def run_there(func, args, kwargs):
    "Run `func` on the CPU tensors behind its arguments; refuse what a GPU would refuse, note where it would wait"
    name = _name(func)
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    there = [isinstance(t, There) for t in tensors]
    if name not in FREE: Device.launches[name] += 1
    if name in COPIES: return _copy(name, func, args, kwargs, tensors, there)
    _refuse_two_devices(name, tensors)
    if name in READS and any(there): Device.note(name)
    if name in INDEXES and there[0] and any(t.dtype in (torch.bool, torch.uint8) for t in tree_leaves(args[1])if isinstance(t, torch.Tensor)):
        Device.note(f'{name} by a mask')
    out = _call(func, args, kwargs)
    return _marked(out, tensors) if any(there) or _is_there(kwargs.get('device')) else out


def _refuse_two_devices(name, tensors):
    here = [t for t in tensors if not isinstance(t, There) and t.dim()]  # a number of the CPU may go with any tensor
    if not here or len(here) == len(tensors): return
    if name in INDEXES and isinstance(tensors[0], There) and all(t.dtype == torch.long for t in here):
        Device.note(f'{name} with indices of the CPU')  # allowed, by a copy
        return
    raise RuntimeError(f'{name}: tensors on two devices, {[(tuple(t.shape), t.device.type) for t in tensors]}')


def _copy(name, func, args, kwargs, tensors, there):
    "A copy does not wait if it comes from pinned memory, or goes to the host and is read after an event"
    quick = bool(kwargs.get('non_blocking')) or name == 'copy_' and len(args) > 2 and bool(args[2])
    source,target = (1, 0) if name == 'copy_' else (0, None)
    goes_there = there[target] if target is not None else _is_there(kwargs['device']) if kwargs.get('device') is not None else there[source]
    if goes_there and not there[source] and not (quick and Device.is_pinned(tensors[source])):
        Device.note('a copy to the device' + (' from memory that is not pinned' if quick else ''))
    leaves = there[source] and not goes_there
    if leaves and not quick: Device.note('a copy to the CPU')
    out = _call(func, args, kwargs)
    if leaves and quick:
        Device._copies += 1
        Device._under_way[_memory(args[0] if name == 'copy_' else out)] = (Device._copies, out)
    if name == 'copy_': return args[0]
    return _marked(out, tensors) if goes_there else out


def _call(func, args, kwargs):
    if _is_there(kwargs.get('device')): kwargs = dict(kwargs, device='cpu')
    if kwargs.get('pin_memory'): kwargs = dict(kwargs, pin_memory=False)
    args,kwargs = tree_map_only(There, lambda t: t.here, (args, kwargs))
    return func(*args, **kwargs)


def _marked(out, tensors):
    "Results are there too; what an operation in place returns is the tensor that it was given"
    known = {id(t.here): t for t in tensors if isinstance(t, There)}
    return tree_map_only(torch.Tensor, lambda o: known[id(o)] if id(o) in known else There(o), out)


class Event:
    "In place of `torch.Event`: what was copied before `record` has arrived once `query` says so, which it does when asked for the second time"
    def __init__(self, *args, **kwargs): self.asked,self.copies = 0,None
    def record(self, stream=None): self.asked,self.copies = 0,Device._copies
    def query(self):
        self.asked += 1
        if self.asked > 1: self._arrived()
        return self.asked > 1 or self.copies is None
    def synchronize(self):
        Device.note('Event.synchronize')
        self._arrived()
    def _arrived(self):
        for memory in [m for m,(i,_) in Device._under_way.items() if i <= (self.copies or 0)]: del Device._under_way[memory]


class Module(_DummyBackendModule):
    "What PyTorch asks of a device beyond the operations"
    def get_amp_supported_dtype(self): return [torch.bfloat16, torch.float16]
    def synchronize(self, device=None): Device.note('synchronize')
    def empty_cache(self): pass


# --- PyTorch, changed for this process

def _as_subclass(self, cls, plain=torch.Tensor.as_subclass, made={}):
    "fastai's `TensorImage` of a tensor that is there is of both classes at once"
    if not isinstance(self, There): return plain(self, (torch.Tensor if cls is There else cls.__bases__[0]) if issubclass(cls, There) else cls)
    if cls is torch.Tensor: cls = There
    if not issubclass(cls, There): cls = made.setdefault(cls, type(cls.__name__, (cls, There), {}))
    if type(self) is cls: return self
    with torch._C.DisableTorchFunctionSubclass(): t = torch.ops.aten.alias(self)
    t.__class__ = cls
    return t


HALVED = 'conv2d', 'linear', 'matmul', 'mm', 'bmm', 'addmm'

def _teach_autocast():
    "Inside autocast, what multiplies matrices does so in half precision, as on a GPU"
    library = torch.library.Library('aten', 'IMPL')
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
    def halved(op):
        def call(*args, **kwargs):
            dtype = torch.get_autocast_dtype('npu')
            half = lambda t: t.to(dtype) if t.is_floating_point() and t.device.type == 'npu' else t
            with torch._C._ExcludeDispatchKeyGuard(autocast): return op(*tree_map_only(torch.Tensor, half, args), **kwargs)
        return call
    rest = torch.library.Library('_', 'IMPL')
    rest.fallback(torch.library.fallthrough_kernel, 'AutocastPrivateUse1')
    for name in HALVED: library.impl(name, halved(getattr(torch.ops.aten, name).default), 'AutocastPrivateUse1')
    return library, rest  # what they register lasts as long as they do


_setup_privateuseone_for_python_backend('npu', backend_module=Module())
torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device=)` is made on the CPU and then copied, as on a GPU
torch.__future__.set_swap_module_params_on_conversion(True)  # a parameter stays the same object when it moves, as on a GPU
torch.Tensor.as_subclass = _as_subclass
torch.Tensor.pin_memory = lambda self, device=None: Device.pin(self.clone())
torch.Tensor.is_pinned = lambda self, device=None: Device.is_pinned(self)
torch.Event = Event
_libraries = _teach_autocast()
_load = torch.load
torch.load = lambda f, map_location=None, **kwargs: _load(f, map_location='cpu', **kwargs)
