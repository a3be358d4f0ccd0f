// Shared by every kernel; the loader splices this text in front of each source.
#pragma once
