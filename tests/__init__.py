from .rounding import activate

activate()  # here, where the processes that tests start begin, too
